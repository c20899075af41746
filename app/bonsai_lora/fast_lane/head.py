"""Parse a request head with httptools, the parser that uvicorn uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import httptools

from bonsai_lora.api.body import parse_length
from bonsai_lora.api.call import join_headers
from bonsai_lora.api.connection import MAX_HEAD_LINES
from bonsai_lora.api.heads import is_host
from bonsai_lora.api.middleware import REQUEST_ID, TRACEPARENT, trace_id_of
from bonsai_lora.api.options import HEADER_LENGTH


@dataclass(frozen=True, eq=False, slots=True)
class RequestHead:
    """The head of a POST with a Content-Length, on a keep-alive connection."""

    path: str
    query_string: bytes
    headers: Mapping[bytes, bytes]
    """Values by lower-case name."""
    request_id: bytes | None
    """The client's first X-Request-Id."""
    trace_id: str | None
    """The trace id of the client's `traceparent`."""
    length: int
    """Length of the body in bytes."""
    data_start: int
    """Offset of an inference's binary data in the body; 0 if not given."""
    expects: bool
    """Whether the client waits for `100 Continue`."""


def read_head(raw: bytes) -> RequestHead | None:
    """Parse `raw`, a request head up to and including its empty line.

    Returns None for anything but an HTTP/1.1 keep-alive POST with a Content-Length, at most
    MAX_HEAD_LINES header lines, a path, one Host, and no Origin. uvicorn's parser handles the
    others.
    """
    collected = _Collected()
    try:
        collected.parser.feed_data(raw)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    if len(collected.headers) > MAX_HEAD_LINES:
        return None
    headers = join_headers(collected.headers)
    declared = headers.get(b"content-length", b"")
    has_host = is_host(headers.get(b"host", b" ")) and collected.url.startswith(b"/")
    is_plain = collected.is_plain and has_host and b"transfer-encoding" not in headers
    if not (is_plain and declared.isdigit()):
        return None
    if b"origin" in headers:  # from a web page: CORS belongs to the framework
        return None
    url = httptools.parse_url(collected.url)
    path = url.path.decode("ascii")
    if "%2F" in path.upper():  # left to the framework, which takes it for a part of a name
        return None
    return RequestHead(
        unquote(path) if "%" in path else path,
        url.query or b"",
        headers,
        next((value for name, value in collected.headers if name == REQUEST_ID), None),
        trace_id_of(headers.get(TRACEPARENT, b"")),
        parse_length(declared),
        parse_length(headers.get(HEADER_LENGTH, b"")),
        headers.get(b"expect", b"").lower() == b"100-continue",
    )


class _Collected:
    """The parser's callbacks and what they have collected."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.is_plain = False
        """Whether this is an HTTP/1.1 POST on a keep-alive connection."""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        # Read here: after the end of a request without a body the parser has reset these.
        parser = self.parser
        self.is_plain = (
            parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
        )
