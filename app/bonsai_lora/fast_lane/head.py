"""The head of an HTTP request, read by the parser that uvicorn uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import httptools

from bonsai_lora.api.body import parse_length
from bonsai_lora.api.call import join_lines
from bonsai_lora.api.middleware import REQUEST_ID
from bonsai_lora.api.options import HEADER_LENGTH


@dataclass(frozen=True, eq=False, slots=True)
class RequestHead:
    """A POST with a Content-Length, on a connection that stays open."""

    path: str
    query_string: bytes
    headers: Mapping[bytes, bytes]
    """By lower-case name."""
    request_id: bytes | None
    """The caller's first X-Request-Id."""
    length: int
    """Of the body, in bytes."""
    data_start: int
    """Where in the body an inference's binary data begin, 0 where that is not said."""
    expects: bool
    """Whether the client waits for `100 Continue`."""


def read_head(raw: bytes) -> RequestHead | None:
    """Return the head that `raw` is, from its first line to the empty one.

    None where it is not HTTP/1.1, not a POST of a declared length, or the last request of its
    connection: uvicorn's parser takes those.
    """
    collected = _Collected()
    try:
        collected.parser.feed_data(raw)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    headers = join_lines(collected.headers)
    declared = headers.get(b"content-length", b"")
    if not declared.isdigit() or b"transfer-encoding" in headers or not collected.is_plain:
        return None
    url = httptools.parse_url(collected.url)
    path = url.path.decode("ascii")
    return RequestHead(
        unquote(path) if "%" in path else path,
        url.query or b"",
        headers,
        next((value for name, value in collected.headers if name == REQUEST_ID), None),
        parse_length(declared),
        parse_length(headers.get(HEADER_LENGTH, b"")),
        headers.get(b"expect", b"").lower() == b"100-continue",
    )


class _Collected:
    """What the parser calls."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.is_plain = False
        """Whether it is a POST in HTTP/1.1 that leaves the connection open."""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        # Asked here: behind the end of a request without a body the parser has forgotten it.
        parser = self.parser
        self.is_plain = (
            parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
        )
