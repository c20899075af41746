"""The asyncio protocols: pass received bytes to a `LaneCall` or to uvicorn's parser."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from starlette.requests import ClientDisconnect

from bonsai_lora.api.body import LONG_BYTES
from bonsai_lora.api.connection import GuardedProtocol
from bonsai_lora.api.pace import Pace
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.fast_lane.call import LaneCall
from bonsai_lora.fast_lane.routes import FastLane
from bonsai_lora.service.work import INLINE_NANOSECONDS

_HEAD_BYTES = 1 << 13
"""Longest head parsed here. Longer and incomplete heads go to uvicorn's parser."""
_BEGUN_BYTES = LONG_BYTES // 2
"""How much of a long body has to arrive before it has a place."""
_CHUNKED_BYTES = 1 << 14
"""Most bytes to read at once of a body in chunks."""
_START = b"POST /v"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class LaneConnection(asyncio.BufferedProtocol):
    """Reads long bodies straight into their arrays; hands everything else to `LaneProtocol`.

    uvicorn creates one per connection. As a BufferedProtocol it chooses the buffer of each read.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._http = LaneProtocol(self, *args, **options)
        self._buffer = self._http.lane.read_buffer
        self._target: memoryview | None = None
        """The array that the rest of a body is read into."""
        self._filled = 0
        self._begin: Callable[[], None] | None = None
        self._complete: asyncio.Future[None] = self._http.loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return the buffer for the next read."""
        if self._target is not None:
            return self._target[self._filled :]
        # Between requests read little, so that little of a long body has to be copied again, and
        # that few of many pipelined requests, or of many short chunks, are parsed at once.
        if not self._http.is_in_body:
            return self._buffer[:LONG_BYTES]
        return self._buffer[:_CHUNKED_BYTES] if self._http.is_chunked else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process `nbytes` received bytes."""
        if self._target is None:
            self._http.data_received(bytes(self._buffer[:nbytes]))
            return
        self._filled += nbytes
        self._check_begun()
        if self._filled == len(self._target):
            self._target = None
            if not self._complete.done():
                self._complete.set_result(None)

    async def fill(
        self, target: memoryview, filled: int, stall_seconds: float, begin: Callable[[], None]
    ) -> None:
        """Read into `target`, starting at `filled`, until it is full.

        Calls `begin` when enough has arrived, and raises its errors, StalledError if the client
        sends at less than the `Pace`, and ClientDisconnect.
        """
        loop = self._http.loop
        self._complete = loop.create_future()
        self._target, self._filled, self._begin = target, filled, begin
        self._check_begun()
        self._watch(Pace(stall_seconds, self._http.lane.context.is_crowded))
        try:
            await self._complete
        finally:
            self._target = self._begin = None
            if self._timer is not None:
                self._timer.cancel()

    def _check_begun(self) -> None:
        """Call `begin` once enough of the body has arrived."""
        if self._begin is not None and self._filled >= _BEGUN_BYTES:
            begin, self._begin = self._begin, None
            try:
                begin()
            except BonsaiLoraError as error:
                if not self._complete.done():  # the body may have stalled already
                    self._complete.set_exception(error)

    def _watch(self, pace: Pace) -> None:
        seconds = pace.left_seconds
        self._timer = self._http.loop.call_later(seconds, self._check, pace, self._filled, seconds)

    def _check(self, pace: Pace, before: int, waited_seconds: float) -> None:
        """Abort the read if too little has been received."""
        pace.note(waited_seconds, self._filled - before)
        if pace.left_seconds > 0:
            self._watch(pace)
        elif not self._complete.done():
            self._complete.set_exception(pace.too_slow())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Forward to the HTTP protocol."""
        self._http.connection_made(cast("asyncio.Transport", transport))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forward to the HTTP protocol, and wake a pending `fill`."""
        self._http.connection_lost(exc)
        if self._target is not None and not self._complete.done():
            self._complete.set_exception(ClientDisconnect())

    def eof_received(self) -> bool:
        """Close, unless a response is due: a client that stops inside a body gets none."""
        return self._target is None and self._http.eof_received()

    def pause_writing(self) -> None:
        """Forward to the HTTP protocol."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Forward to the HTTP protocol."""
        self._http.resume_writing()


class LaneProtocol(GuardedProtocol):
    """The guarded protocol plus the fast lane: a `LaneCall` serves requests to its routes."""

    def __init__(self, connection: LaneConnection, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fill = connection.fill
        self.lane: FastLane = self.app.state.fast_lane
        self.is_parsing = False
        """Whether uvicorn's parser is in the middle of a request."""
        self._call: LaneCall | None = None
        self._pipelined = b""
        """Pipelined bytes, received before they can be processed."""
        self._discarding = 0
        """Bytes still to be discarded of a refused request's body."""
        self._active_at = 0.0
        """Loop time of the last received bytes or finished response."""
        self._body_since = 0.0
        """Loop time since which a short body is waited for, or is fast enough."""
        self._missing = 0
        """Bytes of the body that were missing then."""

    @property
    def is_in_body(self) -> bool:
        """Whether uvicorn's parser is in the middle of a body."""
        return self.is_parsing and not self._is_in_head

    @property
    def _is_idle(self) -> bool:
        """Whether uvicorn's parser waits for no response."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Initialize the timers."""
        super().connection_made(transport)
        self.peer = self.lane.authenticator.peer_of(self.server, self.client)
        self._check_seconds = min(self.timeout_keep_alive, self.stall_seconds)

    def data_received(self, data: bytes) -> None:
        """Start or continue the requests in `data`."""
        began = self._active_at = self.loop.time()
        if self._linger_bytes is not None:
            super().data_received(data)
            return
        if self._pipelined:
            data, self._pipelined = self._pipelined + data, b""
        while data and not self.is_ending:
            if self._discarding:
                data, skipped = data[self._discarding :], len(data)
                self._discarding = max(0, self._discarding - skipped)
            elif self._call is not None:
                data = self._call.feed(data)
                if data and self._call is not None:
                    self._postpone(data)
                    return
            elif self.is_parsing or self.unparsed or not self._is_idle:
                super().data_received(data)
                return
            elif self.flow.write_paused:
                self._postpone(data)
                return
            else:
                data = self._start_request(data)
                if data and self.loop.time() - began > INLINE_NANOSECONDS / 1e9:
                    self._postpone(data)  # let other connections run
                    self.loop.call_soon(self._resume)
                    return

    def _start_request(self, data: bytes) -> bytes:
        """Start the request at the beginning of `data`; return the bytes after it."""
        end = data.find(b"\r\n\r\n", 0, _HEAD_BYTES) + 4
        found = None
        if end >= 4 and data.startswith(_START):
            found = self.lane.match_head(data[:end])
        if found is None:
            self.flush()  # the parser may respond and close immediately
            super().data_received(data)
            return b""
        self.stop_head_timer()
        self._call = call = LaneCall(self, *found)
        rest = call.feed(data[end:])
        if self._call is call:
            self._body_since, self._missing = self._active_at, call.missing
            self._schedule_check(self._check_seconds)
        return rest

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the response to a complete request; close it otherwise."""
        self.flush()
        call = self._call
        if call is None:
            return super().eof_received()
        call.keep_alive = False
        return not call.missing

    def send_continue(self) -> None:
        """Send `100 Continue` to a client that waits for it."""
        self.flush()
        self.transport.write(_CONTINUE)

    def write(self, data: bytes) -> None:
        """Add a short response to the batch."""
        self.lane.batch.add(self.loop, self.transport, data)

    def flush(self) -> None:
        """Write all batched responses."""
        self.lane.batch.flush()

    def _postpone(self, data: bytes) -> None:
        """Keep `data` until the current response is written, and pause reading."""
        self._pipelined = data
        self.flow.pause_reading()

    def _resume(self) -> None:
        """Resume reading and process the kept bytes."""
        if self._pipelined and not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(b"")

    def end_call(self, call: LaneCall) -> None:
        """Close the connection after `call`, or prepare it for the next request."""
        self._call = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if not call.keep_alive:
            self.flush()
            if call.missing:
                self.linger()
            else:
                self.transport.close()
            return
        self._discarding = call.missing
        self._active_at = self.loop.time()
        self._schedule_check(self._check_seconds)
        if self._pipelined:
            self.loop.call_soon(self._resume)

    def _schedule_check(self, seconds: float) -> None:
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                seconds, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, or stall a call whose body stopped arriving.

        Rescheduling one timer when it fires is cheaper than setting a timer per request.
        """
        self.timeout_keep_alive_task = None
        call = self._call
        is_busy = call is not None and call.is_started
        # Computing, or waiting for the client to read, which `GuardedProtocol` bounds.
        if is_busy or self._pipelined or self.flow.write_paused:
            self._schedule_check(self._check_seconds)
            return
        now = self.loop.time()
        if call is not None and self._missing - call.missing >= self._read_pace.needed_bytes:
            self._body_since, self._missing = now, call.missing
        since = self._active_at if call is None else self._body_since
        left = since + (self.timeout_keep_alive if call is None else self.stall_seconds) - now
        if left > 0:
            self._schedule_check(min(left, self._check_seconds))
        elif call is None:
            super().timeout_keep_alive_handler()
        else:
            call.stall()

    def shutdown(self) -> None:
        """Close the connection once the response in flight is complete."""
        self.flush()
        if self._call is None:
            super().shutdown()
        else:
            self._call.keep_alive = False

    def on_message_begin(self) -> None:
        """Note that uvicorn's parser has started a request."""
        self.is_parsing = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that the request is complete."""
        self.is_parsing = False
        super().on_message_complete()

    def resume_writing(self) -> None:
        """Resume with the kept bytes."""
        super().resume_writing()
        if self._pipelined and self._call is None:
            self.loop.call_soon(self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the kept bytes."""
        self._pipelined = b""
        super().connection_lost(exc)
