"""The head of an HTTP request, read as uvicorn reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import httptools

from app.api.body import parse_length

HEADER_LENGTH = b"inference-header-content-length"
"""Length of an inference's JSON, before binary data (Triton's extension binary_tensor_data)."""


@dataclass(frozen=True, eq=False, slots=True)
class RequestHead:
    """A POST with a Content-Length, on a connection that stays open."""

    path: str
    query_string: bytes
    headers: Mapping[bytes, bytes]
    """By lower-case name."""
    length: int
    """Of the body, in bytes."""
    data_start: int
    """Where in the body an inference's data begin, 0 where that is not said."""
    expects: bool
    """Whether the client waits for `100 Continue`."""


def read_head(raw: bytes) -> RequestHead | None:
    """Return the head that `raw` is, from its first line to the empty one.

    None where it is not HTTP/1.1, no plain POST of a declared length, or the last request of its
    connection: those take the long way.
    """
    collected = _Collected()
    parser = httptools.HttpRequestParser(collected)
    try:
        parser.feed_data(raw)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    headers = join_lines(collected.headers)
    declared = headers.get(b"content-length")
    if (
        declared is None
        or b"transfer-encoding" in headers
        or parser.get_method() != b"POST"
        or parser.get_http_version() != "1.1"
        or not parser.should_keep_alive()
    ):
        return None
    url = httptools.parse_url(collected.url)
    path = url.path.decode("ascii")
    return RequestHead(
        unquote(path) if "%" in path else path,
        url.query or b"",
        headers,
        parse_length(declared),
        parse_length(headers.get(HEADER_LENGTH, b"")),
        headers.get(b"expect", b"").lower() == b"100-continue",
    )


def join_lines(lines: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return header lines by name; lines of one name are one list (RFC 9110 section 5.3)."""
    headers = dict(lines)
    if len(headers) != len(lines):
        for name in headers:
            headers[name] = b", ".join(value for one, value in lines if one == name)
    return headers


class _Collected:
    """What the parser calls."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))
