"""Request and response of the routes that both FastAPI and the fast lane call."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bonsai_lora.api.body import check_length, parse_length, read_all
from bonsai_lora.api.context import Context, get_context
from bonsai_lora.wire.buffers import Buffer

JOINED_BYTES = 1 << 16
"""Responses up to this length are joined: one copy costs less than a second write."""

HeaderLines = Sequence[tuple[bytes, bytes]]
"""Header names and values."""


class Call(ABC):
    """A request: its headers and query string, and a method that reads its body."""

    __slots__ = ("context", "headers", "query_string", "scope")

    def __init__(
        self,
        context: Context,
        scope: MutableMapping[str, Any],
        headers: Mapping[bytes, bytes],
        query_string: bytes,
    ) -> None:
        self.context = context
        self.scope = scope
        """What logs, metrics and error responses report of the request."""
        self.headers = headers
        """Values by lower-case name; repeated headers are joined into one list."""
        self.query_string = query_string

    async def body(self, limit: int) -> Buffer:
        """Return the body, without a copy if the server can avoid it.

        Raises BodyTooLargeError over `limit` bytes, StalledError, ClientDisconnect.
        """
        declared = self.headers.get(b"content-length")
        if declared is not None:
            check_length(parse_length(declared), limit)
        return await self._read(limit)

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
        super().__init__(context, scope, join_headers(scope["headers"]), scope["query_string"])
        self._request = request

    async def _read(self, limit: int) -> Buffer:
        return await read_all(self._request, limit)


async def get_call(request: Request) -> Call:
    """Return the request as a call."""
    return RequestCall(await get_context(request), request)


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
        parts = self.parts if self.size_bytes > JOINED_BYTES else (b"".join(self.parts),)
        for part in parts[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": parts[-1]})


def join_headers(lines: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name; repeated ones are joined with commas (RFC 9110, section 5.3)."""
    headers = dict(lines)
    if len(headers) == len(lines):
        return headers
    values: dict[bytes, list[bytes]] = {}
    for name, value in lines:
        values.setdefault(name, []).append(value)
    return {name: b", ".join(found) for name, found in values.items()}
