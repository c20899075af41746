"""Compressed bodies (RFC 9110, section 8.4.1), with a limit on their decompressed length."""

import zlib

from bonsai_lora.errors import BodyTooLargeError, MalformedBodyError, UnsupportedMediaTypeError

_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""zlib's window bits by content coding; `deflate` is the zlib format."""

MOST_EXPANSION = 1032
"""Most bytes that one byte of DEFLATE data decompresses to (zlib's technical notes)."""

_FASTEST = 1


def parse_content_encoding(header: str | None) -> str | None:
    """Return the coding that Content-Encoding names; None for identity.

    Raises UnsupportedMediaTypeError for codings other than gzip and deflate.
    """
    coding = (header or "identity").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in _WINDOWS:
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {coding[:100]!r} is not supported; send gzip, deflate or identity",
            got=coding[:100],
            expected=["gzip", "deflate", "identity"],
        )
    return coding


def decompress(body: bytes | memoryview, coding: str, limit: int) -> bytes:
    """Return the decompressed `body`.

    Raises BodyTooLargeError as soon as it exceeds `limit` bytes, MalformedBodyError if it is
    invalid, truncated, or followed by other bytes.
    """
    stream = zlib.decompressobj(_WINDOWS[coding])
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedBodyError(
            f"the body is not {coding}: {error}; send it as Content-Encoding declares"
        ) from None
    if len(plain) > limit:
        raise BodyTooLargeError(
            f"the body decompresses to more than the limit of {limit} bytes; send less per "
            "request, or raise the limit (see serve --help)",
            limit_bytes=limit,
        )
    if not stream.eof:
        raise MalformedBodyError(f"the {coding} body is truncated; send all of it")
    if stream.unused_data:
        raise MalformedBodyError(
            f"the {coding} body has bytes after its end; send one compressed stream"
        )
    return plain


def compress(body: bytes, coding: str) -> bytes:
    """Return `body` compressed with `coding` at the fastest level: floats hardly shrink."""
    stream = zlib.compressobj(_FASTEST, zlib.DEFLATED, _WINDOWS[coding])
    return stream.compress(body) + stream.flush()


def response_coding(accept_encoding: str | None) -> str | None:
    """Return the coding of the response: the only one that Accept-Encoding names, else None.

    Most clients accept several codings by default. Only a client that names a single one, as
    tritonclient does, prefers it to a fast response.
    """
    coding = (accept_encoding or "").strip().lower()
    return coding if coding in _WINDOWS else None
