"""Connection limits below ASGI.

Closes connections whose request heads are too large or too slow, and those of clients that read
their responses too slowly. `bonsai-lora serve` always uses this protocol; the fast lane extends it.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import httptools
from starlette.responses import Response
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from bonsai_lora.api.body import parse_length
from bonsai_lora.api.call import JOINED_BYTES, HeaderLines
from bonsai_lora.api.errors import problem_response
from bonsai_lora.api.heads import check_version, resolve_target
from bonsai_lora.api.middleware import request_id_of
from bonsai_lora.api.pace import Pace
from bonsai_lora.api.reading import ReadingTimeout
from bonsai_lora.errors import BonsaiLoraError, HeadTooLargeError, MalformedRequestError
from bonsai_lora.wire.buffers import Buffer

MAX_HEAD_BYTES = 1 << 16
"""Longest request head in bytes: the request line and all header lines."""
MAX_HEAD_LINES = 100
"""Most header lines of a request."""

_PIECE_BYTES = 1 << 10
"""Most bytes of a head to parse at once: few requests begin in so many."""
_CHUNKED_BYTES = 1 << 12
"""The same in a body that comes in chunks."""

LINGER_SECONDS = 1.0
"""How long a connection stays open after a refusal while the client is still sending."""
_PAUSE_SECONDS = 0.1
"""How long nothing is read at first."""
_LINGER_BYTES = 1 << 20
"""Most bytes to read and drop meanwhile."""

_TOO_LARGE = HeadTooLargeError(
    f"the request head is longer than {MAX_HEAD_BYTES} bytes or {MAX_HEAD_LINES} lines; send fewer "
    "or shorter headers",
    limit_bytes=MAX_HEAD_BYTES,
    limit_lines=MAX_HEAD_LINES,
)
_UNREADABLE = MalformedRequestError(
    "the request is not HTTP/1.1 as RFC 9112 defines it; check the client, and what is between"
)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits, so that no client holds memory or a connection forever.

    A head must be complete within `stall_seconds` and fit in MAX_HEAD_BYTES and MAX_HEAD_LINES
    (431 otherwise). A client that reads its response at less than the `Pace` is disconnected, and
    one that has not read the last of it `stall_seconds` after the connection was closed here.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout for the first request head."""
        super().connection_made(transport)
        self.stall_seconds: float = self.app.state.context.settings.stall_seconds
        self._running: Any = None  # a RequestResponseCycle
        """The request whose response is in progress, or was last."""
        self._is_in_head = False
        self._head_bytes = 0
        self._head_lines = 0
        self._partial_bytes = 0
        """Bytes of a header line that is not complete."""
        self._plain_head = b""
        """A head to be parsed again."""
        self.unparsed = b""
        """What follows the requests that wait for their turn."""
        self._is_ended = False
        """Whether the client has ended its side meanwhile."""
        self._body_bytes = 0
        """How much of a body of known length is missing."""
        self.is_chunked = False
        """Whether the body of the present request comes in chunks."""
        self._refusal = _UNREADABLE
        """The error for a request that the parser refuses."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._start_head_timer()
        self._read_pace = Pace(self.stall_seconds, self.app.state.context.is_crowded)
        self._reading = ReadingTimeout(self.loop, transport, self._read_pace)
        self._linger_bytes: int | None = None
        """Once lingering: how many more bytes to drop."""

    def data_received(self, data: bytes) -> None:
        """Parse `data` up to the end of a request, and the rest once that has its response."""
        if self._linger_bytes is not None:
            self._drop(len(data))
            return
        self.unparsed += data
        self._unset_keepalive_if_required()
        while self.unparsed and not self._is_waiting and not self.is_ending:
            size = self._piece_bytes()
            piece, self.unparsed = self.unparsed[:size], self.unparsed[size:]
            self._parse_piece(piece)
        if self.unparsed:
            self.flow.pause_reading()

    @property
    def _is_waiting(self) -> bool:
        """Whether a complete request has no response yet."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _piece_bytes(self) -> int:
        """Return how much to parse at once: the rest of a body, or a head, if it is short."""
        if self._body_bytes:
            return self._body_bytes
        if self.is_chunked and not self._is_in_head:
            return _CHUNKED_BYTES
        end = self.unparsed.find(b"\r\n\r\n", 0, _PIECE_BYTES)
        return _PIECE_BYTES if end < 0 else end + 4

    def _parse_piece(self, data: bytes) -> None:
        """Parse `data`, within the limits of a request head."""
        counted = self._head_bytes
        self._parse(data)
        if self.is_ending:
            return
        if self._is_in_head:
            # The parser reports a line only when it is complete, so count the raw bytes too.
            last_line = data.rfind(b"\n") + 1
            if last_line:
                self._partial_bytes = len(data) - last_line
            elif counted == self._head_bytes:
                self._partial_bytes += len(data)
            if self._is_too_large:
                self._refuse_unreadable()
                return
        elif self.cycle is not None:
            if not self.cycle.response_complete:
                return
            self.stop_head_timer()  # the rest of a refused body: it must go on, and may be long
        # In a head, after one, or in empty lines before it.
        if self._head_timer is None:
            self._start_head_timer()

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data, self._plain_head = self._plain_head + data[upgrade.args[0] :], b""
            except httptools.HttpParserError:
                self._refuse_unreadable()
                return
            else:
                return

    def on_message_begin(self) -> None:
        """Reset the counters of the request head."""
        self._is_in_head = True
        self._head_bytes = self._head_lines = self._partial_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header line; ignore a trailer, which no intermediary has checked as a header."""
        self._head_lines += 1
        self._count(len(name) + len(value))
        if self._is_in_head:
            super().on_header(name, value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        """Stop the timeout for the request head."""
        self._is_in_head = False
        self.stop_head_timer()
        if self.parser.should_upgrade():
            self._plain_head = self._head_without_upgrade()
            return
        version = self.parser.get_http_version()
        try:
            check_version(version)
            self.url = resolve_target(self.url, self.headers, version)
        except MalformedRequestError as error:
            self._refusal = error
            raise
        self.expect_100_continue &= version == "1.1"
        self.is_chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        if not self.is_chunked:
            lengths = [value for name, value in self.headers if name == b"content-length"]
            self._body_bytes = parse_length(lengths[0]) if lengths else 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count the body."""
        self._body_bytes = max(0, self._body_bytes - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is complete."""
        if not self._plain_head:
            self._body_bytes, self.is_chunked = 0, False
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with what the client sent meanwhile; uvicorn reads more of it first."""
        super().on_response_complete()
        if self.pipeline or self.unparsed:
            self.flow.pause_reading()
        if self.unparsed and not self.pipeline:
            self.loop.call_soon(self._parse_more)

    def _parse_more(self) -> None:
        if self.is_ending:
            return
        self.flow.resume_reading()
        GuardedProtocol.data_received(self, b"")
        if self._is_ended and not self.unparsed and not self.eof_received():
            self.transport.close()

    def _refuse_unreadable(self) -> None:
        """Reject an unreadable request and close, once earlier requests have their responses."""
        self.unparsed = b""
        self._drop_incomplete()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                cycle.keep_alive = False
                self.flow.pause_reading()
                return
            cycle.disconnected = True  # its own body is unreadable, and will not be complete
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        self._refuse(_TOO_LARGE if self._is_too_large else self._refusal)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the responses to complete requests; close it otherwise.

        A client may close its side after sending its last request (RFC 9112, section 9.6).
        """
        if self.unparsed:
            self._is_ended = True
            return True
        self._drop_incomplete()
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        return True

    def _drop_incomplete(self) -> None:
        """Forget a pipelined request whose body will never be complete."""
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._reading.start()

    def resume_writing(self) -> None:
        """Note that the client has read almost everything."""
        self._reading.stop()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers, including uvicorn's keep-alive timer, which it leaves running."""
        self.unparsed = b""
        if self._running is not None:  # uvicorn tells only the last of pipelined requests
            self._running.disconnected = True
            self._running.message_event.set()
        self._reading.close()
        self.stop_head_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def write_response(
        self, status: int, lines: HeaderLines, parts: Sequence[Buffer], *, keep_alive: bool
    ) -> None:
        """Write a complete response, bypassing ASGI."""
        head = [STATUS_LINE[status]]
        head += [b"%b: %b\r\n" % line for line in (*self.server_state.default_headers, *lines)]
        head.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        if sum(map(len, parts)) <= JOINED_BYTES:
            self.write(b"".join((*head, *parts)))
        else:
            self.flush()
            self.transport.writelines((b"".join(head), *parts))

    def write(self, data: bytes) -> None:
        """Write a short response."""
        self.transport.write(data)

    def flush(self) -> None:
        """Write responses that `write` may have batched."""

    @property
    def is_ending(self) -> bool:
        """Whether nothing more is to be answered on this connection."""
        return self._linger_bytes is not None or self.transport.is_closing()

    def stop_head_timer(self) -> None:
        """Stop the timeout for the request head."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    @property
    def _is_too_large(self) -> bool:
        head_bytes = self._head_bytes + self._partial_bytes
        return head_bytes > MAX_HEAD_BYTES or self._head_lines > MAX_HEAD_LINES

    def _count(self, size: int) -> None:
        self._head_bytes += size
        self._partial_bytes = 0
        if self._is_too_large:
            raise ValueError("the parser reports this as an invalid request")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        close = partial(self._end, cycle)
        cycle.transport = SimpleNamespace(  # type: ignore[assignment]
            write=self.transport.write, close=close, is_closing=lambda: self.is_ending
        )
        super()._start_asgi_task(cycle, app)

    def _end(self, cycle: RequestResponseCycle) -> None:
        """Close after the last response."""
        if cycle.more_body and cycle.response_complete:
            self.linger()
        else:
            self.transport.close()

    def _head_without_upgrade(self) -> bytes:
        """Return the head without its header Upgrade, which a server may ignore.

        The parser takes what follows such a head for another protocol, even the request's body
        (RFC 9110, section 7.8).
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise ValueError("the parser reports this as an invalid request")
        lines = [b"%b: %b" % line for line in self.headers if line[0] != b"upgrade"]
        return b"\r\n".join((b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"", b""))

    def _refuse(self, error: BonsaiLoraError) -> None:
        request_id = request_id_of(None)
        scope = {"method": "any", "path": "*", "request_id": request_id}
        refusal: Response = problem_response(error, scope)
        lines = [*refusal.raw_headers, (b"x-request-id", request_id.encode())]
        status = refusal.status_code
        self.app.state.observer.observe(scope, status, 0.0)
        self.write_response(status, lines, (bytes(refusal.body),), keep_alive=False)
        self.linger()

    def linger(self) -> None:
        """Close after a refusal, without a reset that could overtake it (RFC 9112, section 9.6).

        Closing while the client is sending would make its system discard the refusal. So stop
        sending, and drop what arrives until the client closes, or for LINGER_SECONDS. Begin with a
        pause: most clients close as soon as they have the refusal, and what they have sent by then
        need not be read.
        """
        self.flush()
        self.stop_head_timer()
        self._unset_keepalive_if_required()
        self._linger_bytes = _LINGER_BYTES
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.pause_reading()
        self.loop.call_later(_PAUSE_SECONDS, self.flow.resume_reading)
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _drop(self, received: int) -> None:
        assert self._linger_bytes is not None
        self._linger_bytes -= received
        if self._linger_bytes < 0:
            self.flow.pause_reading()  # the client has time to read the refusal

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.stall_seconds, self._end_head)

    def _end_head(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # a pipelined head: the response in flight continues
            self._start_head_timer()
