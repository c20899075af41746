"""Serve files whole or by byte range (RFC 9110, section 14)."""

import re
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Protocol, TypeVar

import anyio.to_thread
from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bonsai_lora.api.conditions import not_modified
from bonsai_lora.errors import RangeNotSatisfiableError
from bonsai_lora.service.work import Lane

MAX_RANGES = 64
"""A request for more ranges than this gets the whole file, as the RFC allows."""

T = TypeVar("T")

_BLOCK_BYTES = 1 << 20
_RANGE = re.compile(r"(\d{0,1000})-(\d{0,1000})\Z")

Range = tuple[int, int]
"""Start and stop offset; the stop is exclusive."""


class RangedFile(Protocol):
    """A file that can be read from any offset."""

    size_bytes: int
    etag: str
    media_type: str

    def read(self, start: int, stop: int) -> AsyncIterator[bytes | memoryview]:
        """Yield the bytes [start, stop) in blocks."""
        ...


def file_response(
    request: Request, file: RangedFile, lane: Lane, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the response to GET or HEAD of a file: 200, 206, 304 or 416.

    It has a place in `lane` while it streams; 503 if all are taken.
    """
    response = _respond(request, file, headers)
    return _Admitted(response, lane) if isinstance(response, StreamingResponse) else response


class _Admitted(Response):
    """A response that is admitted to a lane before it starts, and until it ends."""

    def __init__(self, response: StreamingResponse, lane: Lane) -> None:
        self.background = None  # FastAPI reads this attribute
        self._response = response
        self._lane = lane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lane.admit():
            # A file that cannot be read is refused before the first byte.
            self._response.body_iterator = await _begun(aiter(self._response.body_iterator))
            await self._response(scope, receive, send)


async def _begun(blocks: AsyncIterator[T]) -> AsyncIterator[T]:
    """Return `blocks`, of which the first is already read."""
    first = await anext(blocks, None)

    async def all_blocks() -> AsyncIterator[T]:
        if first is not None:
            yield first
            async for block in blocks:
                yield block

    return all_blocks()


def _respond(request: Request, file: RangedFile, headers: Mapping[str, str] | None) -> Response:
    common = {"ETag": file.etag, "Accept-Ranges": "bytes", **(headers or {})}
    if not_modified(request, file.etag):
        return Response(status_code=304, headers=common)
    ranges = _requested_ranges(request, file)
    if ranges is None:
        return _stream(request, file, (0, file.size_bytes), 200, common)
    if len(ranges) == 1:
        common["Content-Range"] = _content_range(ranges[0], file.size_bytes)
        return _stream(request, file, ranges[0], 206, common)
    return _multipart(file, ranges, common)


def parse_ranges(header: str, size: int) -> list[Range] | None:
    """Return the satisfiable ranges of a Range header; None if the header must be ignored.

    Ends beyond the file are clamped. Raises RangeNotSatisfiableError if no range is left.
    """
    unit, _, specs = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    parts = [part.strip() for part in specs.split(",") if part.strip()]
    matches = [_RANGE.match(part) for part in parts]
    if not matches or len(matches) > MAX_RANGES:
        return None
    ranges = []
    for match in matches:
        if match is None or match[0] == "-":
            return None
        first, last = match[1], match[2]
        if first and last and int(last) < int(first):
            return None
        if first:
            start, stop = int(first), min(int(last) + 1 if last else size, size)
        else:
            start, stop = max(0, size - int(last)), size
        if start < stop:
            ranges.append((start, stop))
    if not ranges:
        raise RangeNotSatisfiableError(
            f"the range {header[:100]!r} is beyond the end of the file; request a range within its "
            f"{size} bytes",
            got=header[:100],
            size_bytes=size,
        )
    if sum(stop - start for start, stop in ranges) > size:
        return None  # overlapping ranges may be ignored
    return ranges


def _requested_ranges(request: Request, file: RangedFile) -> list[Range] | None:
    header = request.headers.get("range")
    if_range = request.headers.get("if-range")
    if request.method != "GET" or header is None or if_range not in (None, file.etag):
        return None
    return parse_ranges(header, file.size_bytes)


def _content_range(span: Range, size: int) -> str:
    return f"bytes {span[0]}-{span[1] - 1}/{size}"


def _stream(
    request: Request, file: RangedFile, span: Range, status: int, headers: dict[str, str]
) -> Response:
    headers["Content-Length"] = str(span[1] - span[0])
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=file.media_type)
    return StreamingResponse(file.read(*span), status, headers, file.media_type)


def _multipart(file: RangedFile, ranges: list[Range], headers: dict[str, str]) -> Response:
    boundary = secrets.token_hex(16)
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: {file.media_type}\r\n"
        f"Content-Range: {_content_range(span, file.size_bytes)}\r\n\r\n".encode()
        for span in ranges
    ]
    tail = f"\r\n--{boundary}--\r\n".encode()
    length = sum(map(len, heads)) + sum(b - a for a, b in ranges) + len(tail)

    async def parts() -> AsyncIterator[bytes | memoryview]:
        for head, span in zip(heads, ranges, strict=True):
            blocks = await _begun(file.read(*span))  # refused before its head, if it is the first
            yield head
            async for block in blocks:
                yield block
        yield tail

    headers["Content-Length"] = str(length)
    return StreamingResponse(parts(), 206, headers, f"multipart/byteranges; boundary={boundary}")


class BytesFile:
    """A file in memory or memory-mapped; read in a worker thread, where pages may be loaded."""

    def __init__(self, content: memoryview, etag: str, media_type: str) -> None:
        self.size_bytes = len(content)
        self.etag = etag
        self.media_type = media_type
        self._content = content

    async def read(self, start: int, stop: int) -> AsyncIterator[bytes | memoryview]:
        """Yield the bytes [start, stop) in blocks of at most 1 MiB."""
        for offset in range(start, stop, _BLOCK_BYTES):
            piece = self._content[offset : min(offset + _BLOCK_BYTES, stop)]
            yield await anyio.to_thread.run_sync(bytes, piece)
