"""Connection limits below ASGI.

Closes connections whose request heads are too large or too slow, and those of clients that do not
read their responses. `bonsai-lora serve` always uses this protocol; the fast lane extends it.
"""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import httptools
import structlog
from starlette.responses import Response
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from bonsai_lora.api.call import JOINED_BYTES, HeaderLines
from bonsai_lora.api.errors import problem_response
from bonsai_lora.api.middleware import request_id_of
from bonsai_lora.errors import HeadTooLargeError
from bonsai_lora.wire.buffers import Buffer

MAX_HEAD_BYTES = 1 << 16
"""Longest request head in bytes: the request line and all header lines."""
MAX_HEAD_LINES = 100
"""Most header lines of a request."""

_log = structlog.get_logger("bonsai_lora.requests")


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits, so that no client holds memory or a connection forever.

    A head must be complete within `stall_seconds` and fit in MAX_HEAD_BYTES and MAX_HEAD_LINES
    (431 otherwise). A client that reads none of its response for `stall_seconds` is disconnected,
    even after the connection has been closed on this side.
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
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._start_head_timer()
        self._unread_bytes = math.inf
        """Bytes that the client had not read at the last check; infinite if none had to be."""
        self._check_reading()

    def data_received(self, data: bytes) -> None:
        """Parse `data`, within the limits of a request head."""
        was_in_head, counted = self._is_in_head, self._head_bytes
        self._unset_keepalive_if_required()
        self._parse(data)
        if self.transport.is_closing():
            return
        if self._is_in_head:
            # The parser reports a line only when it is complete, so count the raw bytes too.
            if was_in_head and counted == self._head_bytes:
                self._partial_bytes += len(data)
            if self._is_too_large:
                self.send_400_response("")
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
                message = "Invalid HTTP request received."
                self.logger.warning(message)
                self.send_400_response(message)
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
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that the request is complete."""
        if not self._plain_head:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Reject an unreadable request and close, once earlier requests have their responses."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body or self.pipeline:
                cycle.keep_alive = False
                self.flow.pause_reading()
                return
            cycle.disconnected = True  # its own body is unreadable, and will not be complete
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        if self._is_too_large:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the responses to complete requests; close it otherwise.

        A client may close its side after sending its last request (RFC 9112, section 9.6).
        """
        if self.pipeline and self.cycle.more_body:  # it will never be whole
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        return True

    def resume_writing(self) -> None:
        """Note that the client reads."""
        super().resume_writing()
        self._unread_bytes = math.inf

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers, including uvicorn's keep-alive timer, which it leaves running."""
        if self._running is not None:  # uvicorn tells only the last of pipelined requests
            self._running.disconnected = True
            self._running.message_event.set()
        if self._read_timer is not None:
            self._read_timer.cancel()
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
        super()._start_asgi_task(cycle, app)

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

    def _refuse_head(self) -> None:
        request_id = request_id_of(None)
        scope = {"method": "any", "path": "*", "request_id": request_id}
        refusal: Response = problem_response(
            HeadTooLargeError(
                f"the request head is longer than {MAX_HEAD_BYTES} bytes or {MAX_HEAD_LINES} "
                "lines; send fewer or shorter headers",
                limit_bytes=MAX_HEAD_BYTES,
                limit_lines=MAX_HEAD_LINES,
            ),
            scope,
        )
        lines = [*refusal.raw_headers, (b"x-request-id", request_id.encode())]
        self.app.state.observer.observe(scope, 431, 0.0)
        self.write_response(431, lines, (bytes(refusal.body),), keep_alive=False)
        self.flush()
        self.transport.close()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.stall_seconds, self._end_head)

    def _end_head(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # a pipelined head: the response in flight continues
            self._start_head_timer()

    def _check_reading(self) -> None:
        """Disconnect a client that has read nothing since the last check, though it should."""
        waiting = self.transport.get_write_buffer_size()
        is_due = self.flow.write_paused or (waiting > 0 and self.transport.is_closing())
        if is_due and waiting >= self._unread_bytes:
            _log.warning("disconnected: the client stopped reading", waiting_bytes=waiting)
            self.transport.abort()
            return
        self._unread_bytes = waiting if is_due else math.inf
        self._read_timer = self.loop.call_later(self.stall_seconds, self._check_reading)
