"""Long bodies, from the socket straight into one array; and an end to answers that nobody takes.

uvicorn copies a body four times on its way: into pieces, out of the parser, behind each other, and
the application joins them. Here, once the head of a request has been parsed and its route has asked
for the whole body, the connection is read into the array where the tensors will lie, and given
back to the parser afterwards (docs/decisions/0012-direct-bodies.md).
"""

import asyncio
from typing import Any, cast

import httptools
import numpy as np
import structlog
from starlette.requests import ClientDisconnect
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api.body import parse_length
from app.errors import StalledError
from app.formats.safetensors import as_bytes

DIRECT_BYTES = 1 << 17
"""Shorter bodies come in one or two pieces anyway."""

_log = structlog.get_logger("app.requests")

_EXTENSION = "bonsai_lora.direct_body"


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which offers `DirectBody` to the application for long bodies."""

    stall_seconds = 60.0
    """After so long a client that takes nothing of its answer is ended."""
    _watch: asyncio.TimerHandle | None = None

    def on_headers_complete(self) -> None:
        """Begin a request."""
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is before:
            return  # uvicorn takes it for something else than a request
        if before is not None and not before.response_complete:
            return  # a pipelined request: the one before it owns the connection
        declared = next((value for name, value in self.headers if name == b"content-length"), b"")
        length = parse_length(declared)
        if length >= DIRECT_BYTES:
            scope = cast("dict[str, Any]", self.scope)
            scope["extensions"] = {_EXTENSION: DirectBody(self, self.cycle, length)}

    def pause_writing(self) -> None:
        """Begin to watch a client that does not take its answer."""
        super().pause_writing()
        if self._watch is None:
            self._watch_writing(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """End it."""
        super().resume_writing()
        self._end_watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        self._end_watch()
        super().connection_lost(exc)

    def _watch_writing(self, before: int) -> None:
        """End the connection where nothing of an answer was taken for `stall_seconds`.

        An answer that nobody takes is memory that nothing else bounds.
        """
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            _log.warning("broken off: a client took nothing", waiting_bytes=waiting)
            self.transport.abort()
            return
        self._watch = self.loop.call_later(self.stall_seconds, self._watch_writing, waiting)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def begin_again(self) -> None:
        """Take the connection back, with its next byte the first of a request."""
        self.parser = httptools.HttpRequestParser(self)


class DirectBody(asyncio.BufferedProtocol):
    """The connection's protocol while a body is read."""

    def __init__(self, http: DirectProtocol, cycle: RequestResponseCycle, length: int) -> None:
        self._http = http
        self._cycle = cycle  # the connection's own may be that of the next request by now
        self._length = length
        self._filled = 0

    async def read(self, stall_seconds: float) -> memoryview:
        """Return the body.

        Raises StalledError where nothing comes for so long, ClientDisconnect.
        """
        http, cycle = self._http, self._cycle
        if cycle.disconnected:
            raise ClientDisconnect
        if not cycle.more_body:  # it has come whole; the next request may have begun behind it
            return memoryview(cycle.body)
        assert http.cycle is cycle, "the connection is in the middle of this body"
        self._target = as_bytes(np.empty(self._length, np.uint8))
        self._filled = len(cycle.body)
        self._target[: self._filled] = cycle.body
        cycle.body = bytearray()
        if cycle.waiting_for_100_continue:
            http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        try:
            await self._take(stall_seconds)
        except BaseException:
            cycle.keep_alive = False  # the rest of the body would be taken for a request
            raise
        cycle.more_body = False
        return self._target

    async def _take(self, stall_seconds: float) -> None:
        """Read from the socket until the body is whole."""
        self._done = asyncio.get_running_loop().create_future()
        self._http.flow.resume_reading()
        self._turn_to(self)
        try:
            while not self._done.done():
                before = self._filled
                await asyncio.wait([self._done], timeout=stall_seconds)
                if self._filled == before and not self._done.done():
                    raise StalledError(f"the client sent nothing for {stall_seconds:g} s")
            self._done.result()
        finally:
            self._turn_to(self._http)
        self._http.begin_again()

    def _turn_to(self, protocol: asyncio.BaseProtocol) -> None:
        transport = self._http.transport
        if transport.is_closing():
            return
        transport.pause_reading()  # which of the two ways to read is chosen when reading begins
        transport.set_protocol(protocol)
        transport.resume_reading()

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._target[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Count bytes that have come."""
        self._filled += nbytes
        if self._filled == self._length and not self._done.done():
            self._http.transport.pause_reading()
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on that the client went away."""
        self._http.connection_lost(exc)
        if not self._done.done():
            self._done.set_exception(ClientDisconnect())

    def pause_writing(self) -> None:
        """Pass on."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Pass on."""
        self._http.resume_writing()


def direct_body(scope: Scope) -> DirectBody | None:
    """Return the way to read a long body directly, where the server offers it."""
    extensions: dict[str, Any] = scope.get("extensions") or {}
    return extensions.get(_EXTENSION)
