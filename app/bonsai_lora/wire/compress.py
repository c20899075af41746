"""Compressed bodies (RFC 9110 section 8.4.1), with a bound on what they grow to."""

import zlib

from bonsai_lora.errors import BodyTooLargeError, MalformedBodyError, UnsupportedMediaTypeError

_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Coding -> zlib's window bits; `deflate` is the zlib format."""

_FASTEST = 1


def coding_of(header: str | None) -> str | None:
    """Return the coding that Content-Encoding names, None for identity.

    Raises UnsupportedMediaTypeError for any other than gzip and deflate.
    """
    coding = (header or "identity").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in _WINDOWS:
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {coding[:100]!r} is not taken; send gzip, deflate or identity",
            got=coding[:100],
            expected=["gzip", "deflate", "identity"],
        )
    return coding


def decompress(body: bytes | memoryview, coding: str, limit: int) -> bytes:
    """Return what `body` holds.

    Raises BodyTooLargeError as soon as that is more than `limit` bytes, MalformedBodyError where
    it is no such data, is cut off, or goes on behind its end.
    """
    stream = zlib.decompressobj(_WINDOWS[coding])
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedBodyError(f"the body is not {coding}: {error}") from None
    if len(plain) > limit:
        raise BodyTooLargeError(
            f"the body decompresses to more than {limit} bytes, which is the limit",
            limit_bytes=limit,
        )
    if not stream.eof:
        raise MalformedBodyError(f"the {coding} body is cut off")
    if stream.unused_data:
        raise MalformedBodyError(f"the {coding} body goes on behind its end")
    return plain


def compress(body: bytes, coding: str) -> bytes:
    """Return `body` in `coding`, compressed as fast as possible: floats hardly shrink."""
    stream = zlib.compressobj(_FASTEST, zlib.DEFLATED, _WINDOWS[coding])
    return stream.compress(body) + stream.flush()


def wanted_coding(accept_encoding: str | None) -> str | None:
    """Return the coding for an answer: the one coding that Accept-Encoding names, else None.

    Most clients say by default that they take several. Only one that names a single coding, as
    tritonclient does, wants it more than a quick answer.
    """
    coding = (accept_encoding or "").strip().lower()
    return coding if coding in _WINDOWS else None
