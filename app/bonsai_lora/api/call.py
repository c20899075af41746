"""Request and response of the routes that both FastAPI and the fast lane call."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bonsai_lora.api.body import LONG_BYTES, check_length, parse_length
from bonsai_lora.api.context import Context, get_context
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.media import Form

JOINED_BYTES = 1 << 16
"""Responses up to this length are joined: one copy costs less than a second write."""

_DROPPED_BYTES = 1 << 20
"""Most bytes of a refused body that are read and dropped to keep the connection."""

_COPIES = 2
"""A body takes its length, and its numbers up to as much again as float32."""
_JSON_COPIES = 5
"""A float32 takes 4 bytes, and up to 16 more as JSON."""

_PIECE_BYTES = 1 << 18
"""Piece of a long response for which `send` may wait until the client has read."""

HeaderLines = Sequence[tuple[bytes, bytes]]
"""Header names and values."""


class Call(ABC):
    """A request: its headers and query string, and a method that reads its body.

    From its body until its response is written it has a place in the short lane, and the memory
    that it needs is reserved.
    """

    __slots__ = ("_has_place", "_reserved", "context", "headers", "length", "query_string", "scope")

    def __init__(
        self,
        context: Context,
        scope: MutableMapping[str, Any],
        headers: Mapping[bytes, bytes],
        query_string: bytes,
        length: int | None,
    ) -> None:
        self.context = context
        self.scope = scope
        """What logs, metrics and error responses report of the request."""
        self.headers = headers
        """Values by lower-case name; repeated headers are joined into one list."""
        self.query_string = query_string
        self.length = length
        """Declared length of the body in bytes; None if it is not declared."""
        self._has_place = False
        self._reserved = 0

    async def body(self, limit: int) -> Buffer:
        """Return the body, without a copy if the server can avoid it.

        Raises BusyError if the lane or the memory is full, BodyTooLargeError over `limit` bytes,
        StalledError, ClientDisconnect.
        """
        if self.length is not None:
            check_length(self.length, limit)
            if self.length > LONG_BYTES:
                self.context.short.check()  # refuse what has no place now, before it is sent
        body = await self._read(limit)
        self.enter()
        return body

    def begin_long(self, length: int) -> None:
        """Take a place and memory for a body of up to `length` bytes, once enough has arrived.

        Not at its head: heads cost their sender nothing.
        """
        self.enter()
        self.reserve(_COPIES * length)

    def enter(self) -> None:
        """Take a place, once; raises BusyError if all are taken."""
        if not self._has_place:
            self.context.short.enter(self)
            self._has_place = True

    def reserve(self, size: int) -> None:
        """Reserve memory until the response is written; may be called in any thread.

        Raises BusyError or MemoryBudgetError if it is not available.
        """
        if size > LONG_BYTES:
            self.context.memory.reserve(size)
            self._reserved += size

    def reserve_outputs(self, response_form: Form) -> Callable[[int], None]:
        """Return a function that reserves memory for float32 outputs, and their text as JSON."""
        if response_form is not Form.JSON:
            return self.reserve
        return lambda size: self.reserve(_JSON_COPIES * size)

    def close(self) -> None:
        """Free the place and release the memory, after the response has been written."""
        if self._has_place:
            self._has_place = False
            self.context.short.leave(self)
        if self._reserved:
            self.context.memory.release(self._reserved)
            self._reserved = 0

    def count_rows(self, rows: int) -> None:
        """Count and log that adapters were applied to `rows` vectors."""
        self.context.metrics.rows_applied.inc(rows)
        self.scope["rows"] = rows

    @abstractmethod
    async def _read(self, limit: int) -> Buffer: ...


class RequestCall(Call):
    """A call made through FastAPI, under any ASGI server."""

    __slots__ = ("_request",)

    def __init__(self, context: Context, request: Request) -> None:
        scope = request.scope
        headers = join_headers(scope["headers"])
        declared = headers.get(b"content-length")
        length = None if declared is None else parse_length(declared)
        super().__init__(context, scope, headers, scope["query_string"], length)
        self._request = request

    async def _read(self, limit: int) -> Buffer:
        parts: list[bytes] = []
        received = 0
        async for part in self._request.stream():
            received += len(part)
            check_length(received, limit)
            if received > LONG_BYTES and not self._reserved:
                self.begin_long(limit if self.length is None else self.length)
            if part:  # the last one is empty; a single one is not copied
                parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


async def get_call(request: Request) -> AsyncIterator[Call]:
    """Yield the request as a call, which is closed when the response has been sent."""
    call = RequestCall(await get_context(request), request)
    try:
        yield call
    finally:
        call.close()


class BufferResponse(Response):
    """A 200 response whose body is a list of buffers; long ones are never copied."""

    def __init__(self, parts: Sequence[Buffer], media_type: str, headers: HeaderLines = ()) -> None:
        self.status_code = 200
        self.background = None  # FastAPI reads this attribute
        self.parts = parts
        self.size_bytes = sum(map(len, parts))
        self.raw_headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % self.size_bytes),
            *headers,
        ]

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the response through ASGI."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        rest = b""
        if self.size_bytes <= JOINED_BYTES:
            rest = b"".join(self.parts)
        else:
            for piece in _pieces(self.parts):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": rest})


def _pieces(parts: Sequence[Buffer]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]


def closes(status: int, missing: float) -> bool:
    """Return whether a connection is closed after a refusal.

    Reading the `missing` bytes of the body would cost more than a new connection, or is not worth
    it in an overload.
    """
    return missing > (LONG_BYTES if status == HTTPStatus.SERVICE_UNAVAILABLE else _DROPPED_BYTES)


def join_headers(lines: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name; repeated ones are joined with commas (RFC 9110, section 5.3)."""
    headers = dict(lines)
    if len(headers) == len(lines):
        return headers
    values: dict[bytes, list[bytes]] = {}
    for name, value in lines:
        values.setdefault(name, []).append(value)
    return {name: b", ".join(found) for name, found in values.items()}
