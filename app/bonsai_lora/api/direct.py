"""Hot routes from the socket and back, without ASGI; and an end to answers that nobody takes.

ASGI costs a task, a scope and a queue of messages per request, which together take longer than
applying an adapter to a vector. So uvicorn's protocol is extended: where the bytes between two
requests begin with a head that it has a hot route for, the route's function gets a `DirectCall`.
Everything else goes on to uvicorn's own parser, as if this were not there
(docs/decisions/0011-hot-routes.md, 0012-direct-bodies.md).
"""

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any, cast

import structlog
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bonsai_lora.api.call import JOINED_BYTES, Lines, with_length
from bonsai_lora.api.direct_call import DIRECT_BYTES, DirectCall, scope_of, stalled
from bonsai_lora.api.hot import Found, HotRoutes
from bonsai_lora.api.request_head import RequestHead
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.service.work import AT_ONCE_NANOSECONDS
from bonsai_lora.storage.counts import Counts
from bonsai_lora.wire.buffers import Buffer

_HEAD_BYTES = 1 << 13
"""Longer heads go to uvicorn's parser, as those do that come in pieces."""
_TOGETHER_SECONDS = 1e-4
"""An answer that took longer to compute does not wait for others."""
_HOT_START = b"POST /v"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_log = structlog.get_logger("bonsai_lora.requests")


class DirectConnection(asyncio.BufferedProtocol):
    """A connection that reads long bodies into their arrays, and all else for `DirectProtocol`.

    Takes what uvicorn gives to a protocol. As a BufferedProtocol it says where bytes are to go.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._http = DirectProtocol(self, *args, **options)
        self._buffer = self._http.hot.read_buffer
        self._target: memoryview | None = None
        """Where the rest of a body goes."""
        self._filled = 0
        self._whole: asyncio.Future[None] = self._http.loop.create_future()
        self._watch: asyncio.TimerHandle | None = None

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        if self._target is not None:
            return self._target[self._filled :]
        # Between requests a short piece, so that little of a long body is copied once more.
        return self._buffer if self._http.is_parsing else self._buffer[:DIRECT_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes that have come."""
        if self._target is None:
            self._http.data_received(bytes(self._buffer[:nbytes]))
            return
        self._filled += nbytes
        if self._filled == len(self._target):
            self._target = None
            if not self._whole.done():
                self._whole.set_result(None)

    async def fill(self, target: memoryview, filled: int, stall_seconds: float) -> None:
        """Fill `target`, from `filled` on, with what comes next.

        Raises StalledError where nothing comes for so long, ClientDisconnect.
        """
        loop = self._http.loop
        self._whole = loop.create_future()
        self._target, self._filled = target, filled
        self._watch = loop.call_later(stall_seconds, self._look, filled, stall_seconds)
        try:
            await self._whole
        finally:
            self._target = None
            self._watch.cancel()

    def _look(self, before: int, stall_seconds: float) -> None:
        """Give up a body of which nothing has come since the last look."""
        if self._filled > before:
            now = self._filled
            self._watch = self._http.loop.call_later(stall_seconds, self._look, now, stall_seconds)
        elif not self._whole.done():
            self._whole.set_exception(stalled(stall_seconds))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Pass on."""
        self._http.connection_made(cast("asyncio.Transport", transport))

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on, also to whoever waits for a body."""
        self._http.connection_lost(exc)
        if self._target is not None and not self._whole.done():
            self._whole.set_exception(ClientDisconnect())

    def eof_received(self) -> None:
        """Pass on."""
        self._http.eof_received()

    def pause_writing(self) -> None:
        """Pass on."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Pass on."""
        self._http.resume_writing()


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which answers hot routes by itself."""

    def __init__(self, connection: DirectConnection, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fill = connection.fill
        self.hot: HotRoutes = self.app.hot
        self.is_parsing = False
        """Whether uvicorn's parser is in the middle of a request."""
        self._is_in_head = False
        self._call: DirectCall | None = None
        self._early = b""
        """What came before it could be begun."""
        self._skipping = 0
        """Bytes to come of a body whose request was refused."""
        self._active_at = 0.0
        """When the last bytes came, or the last answer went."""
        self._period = min(self.timeout_keep_alive, self.hot.stall_seconds)
        self._watch: asyncio.TimerHandle | None = None
        self._head_watch: asyncio.TimerHandle | None = None
        """Ends a connection whose head does not come, be it in drops."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Begin, or go on with, the requests that `data` holds."""
        began = self._active_at = self.loop.time()
        if self._early:
            data, self._early = self._early + data, b""
        while data and not self.transport.is_closing():
            if self._skipping:
                data, skipped = data[self._skipping :], len(data)
                self._skipping = max(0, self._skipping - skipped)
            elif self._call is not None:
                data = self._call.take(data)
                if data and self._call is not None:
                    self._hold(data)
                    return
            elif self.is_parsing or not (self.cycle is None or self.cycle.response_complete):
                self._parse(data)
                return
            elif self.flow.write_paused:
                self._hold(data)
                return
            else:
                data = self._begin(data)
                if data and self.loop.time() - began > AT_ONCE_NANOSECONDS / 1e9:
                    self._hold(data)  # others have their turn
                    self.loop.call_soon(self._go_on)
                    return

    def _begin(self, data: bytes) -> bytes:
        """Begin the request at the start of `data`; return what follows it."""
        end = data.find(b"\r\n\r\n", 0, _HEAD_BYTES) + 4
        found = None
        if end >= 4 and data.startswith(_HOT_START):
            found = self.hot.find_head(data[:end])
        if found is None:
            self.hot.outbox.flush()  # the parser may answer and close at once
            self._parse(data)
            return b""
        self._end_head_watch()
        stop = end + found[0].length
        is_whole = stop <= len(data)
        if is_whole and self.answer_planned(*found, data[end:stop], keep_alive=True):
            self._look_later(self._period)
            return data[stop:]
        self._call = call = DirectCall(self, *found, may_be_planned=not is_whole)
        rest = call.take(data[end:])
        if self._call is call:
            self._look_later(self._period)
        return rest

    def _parse(self, data: bytes) -> None:
        """Give `data` to uvicorn's parser."""
        super().data_received(data)
        if self._is_in_head and self._head_watch is None:
            self._watch_head()

    def answer_planned(
        self, head: RequestHead, found: Found, body: Buffer, *, keep_alive: bool
    ) -> bool:
        """Answer a request like one that was answered before; return False where there is none."""
        started = perf_counter()
        counts = Counts()
        scope = scope_of(head)
        try:
            recalled = self.hot.recall(head, found, body, may_take=True)
            if recalled is None or recalled[0].plan.cost > AT_ONCE_NANOSECONDS:
                return False
            planned, lists = recalled
            parts = planned.plan.run(body, lists, self.hot.regions, counts)
            lines = with_length(planned.lines, parts) if planned.plan.is_json else planned.lines
        except (BonsaiLoraError, OSError):
            return False  # the ordinary way says what is wrong
        except Exception:  # noqa: BLE001 - nothing may get out
            self.hot.observer.note_fault(scope)
            return False
        scope["route"] = found.route.about
        try:
            self.write(200, lines, parts, scope["request_id"], keep_alive=keep_alive)
        except ClientDisconnect:
            self.hot.observer.note_disconnect(scope)
            return True
        seconds = perf_counter() - started
        if seconds > _TOGETHER_SECONDS:
            self.hot.outbox.flush()
        self.hot.observer.observe(scope, 200, seconds)
        self.hot.count(planned, counts, seconds)
        return True

    def proceed(self) -> None:
        """Tell a client that waits for it to send its body."""
        self.hot.outbox.flush()
        self.transport.write(_CONTINUE)

    def write(
        self,
        status: int,
        lines: Lines,
        parts: Sequence[Buffer],
        request_id: str,
        *,
        keep_alive: bool,
    ) -> None:
        """Write an answer; raises ClientDisconnect where nobody is there."""
        transport = self.transport
        if transport.is_closing():
            raise ClientDisconnect
        text = [STATUS_LINE[status]]
        text += [b"%b: %b\r\n" % line for line in (*self.server_state.default_headers, *lines)]
        ending = b"" if keep_alive else b"connection: close\r\n"
        text.append(b"x-request-id: %b\r\n%b\r\n" % (request_id.encode(), ending))
        if sum(map(len, parts)) <= JOINED_BYTES:
            self.hot.outbox.put(self.loop, transport, b"".join((*text, *parts)))
        else:
            self.hot.outbox.flush()
            transport.writelines((b"".join(text), *parts))

    def _hold(self, data: bytes) -> None:
        """Keep `data` for when the present answer is on its way."""
        self._early = data
        self.flow.pause_reading()

    def _go_on(self) -> None:
        """Begin what was kept."""
        if self._early and not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(b"")

    def end_call(self, call: DirectCall) -> None:
        """Get ready for the next request."""
        self._call = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.hot.outbox.flush()
        if not call.keep_alive:
            self.transport.close()
            return
        self._skipping = call.missing
        self._active_at = self.loop.time()
        self._look_later(self._period)
        if self._early:
            self.loop.call_soon(self._go_on)

    def _look_later(self, seconds: float) -> None:
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                seconds, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """End a connection on which nothing has happened for too long.

        One timer that looks again is less work than one set anew with each request.
        """
        self.timeout_keep_alive_task = None
        call = self._call
        is_busy = call is not None and call.is_started
        # It works, or it is the client's turn to read: `_watch_writing` bounds that.
        if is_busy or self._early or self.flow.write_paused:
            self._look_later(self._period)
            return
        limit = self.timeout_keep_alive if call is None else self.hot.stall_seconds
        left = self._active_at + limit - self.loop.time()
        if left > 0:
            self._look_later(min(left, self._period))
        elif call is None:
            super().timeout_keep_alive_handler()
        else:
            call.stall()

    def shutdown(self) -> None:
        """End the connection, after the answer that it waits for."""
        self.hot.outbox.flush()
        if self._call is None:
            super().shutdown()
        else:
            self._call.keep_alive = False

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        self.is_parsing = self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that its head has come."""
        self._is_in_head = False
        self._end_head_watch()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that it has come whole."""
        self.is_parsing = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Begin to watch a client that does not take its answer."""
        super().pause_writing()
        if self._watch is None:
            self._watch_writing(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """End it."""
        super().resume_writing()
        self._end_watch()
        if self._early and self._call is None:
            self.loop.call_soon(self._go_on)

    def connection_lost(self, exc: Exception | None) -> None:
        """End what waits for the client."""
        self._end_watch()
        self._end_head_watch()
        self._early = b""
        self._unset_keepalive_if_required()  # uvicorn leaves the timer where there was an error
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        self._head_watch = self.loop.call_later(self.hot.stall_seconds, self._give_up_head)

    def _give_up_head(self) -> None:
        self._head_watch = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # of the next request: the answer before it goes on
            self._watch_head()

    def _end_head_watch(self) -> None:
        if self._head_watch is not None:
            self._head_watch.cancel()
            self._head_watch = None

    def _watch_writing(self, before: int) -> None:
        """End the connection where nothing of an answer was taken for `stall_seconds`.

        An answer that nobody takes is memory that nothing else bounds.
        """
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            _log.warning("broken off: a client took nothing", waiting_bytes=waiting)
            self.transport.abort()
            return
        self._watch = self.loop.call_later(self.hot.stall_seconds, self._watch_writing, waiting)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
