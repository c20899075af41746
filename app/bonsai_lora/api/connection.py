"""Connection limits below ASGI.

Closes connections whose request heads are too large or too slow, and those of clients that do not
read their responses. `bonsai-lora serve` always uses this protocol; the fast lane extends it.
"""

import asyncio
from collections.abc import Sequence

import structlog
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

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
    (431 otherwise). A client that reads none of its response for `stall_seconds` is disconnected.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout for the first request head."""
        super().connection_made(transport)
        self.stall_seconds: float = self.app.state.context.settings.stall_seconds
        self._is_in_head = False
        self._head_bytes = 0
        self._head_lines = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Parse `data`, within the limits of a request head."""
        was_in_head = self._is_in_head
        super().data_received(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        # The parser reports a line only when it is complete, so count the raw bytes too.
        self._head_bytes += len(data) if was_in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("")
        elif self._head_timer is None:
            self._start_head_timer()

    def on_message_begin(self) -> None:
        """Reset the counters of the request head."""
        self._is_in_head = True
        self._head_bytes = self._head_lines = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header line."""
        self._head_lines += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the timeout for the request head."""
        self._is_in_head = False
        self.stop_head_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Reject an unreadable request and close, once earlier requests have their responses."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        elif self._is_too_large:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the answer to a whole request; close it otherwise.

        A client may end its side when it has sent all (RFC 9112, section 9.6).
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self._is_in_head:
            return False
        cycle.keep_alive = False
        return True

    def pause_writing(self) -> None:
        """Start checking that the client reads its response."""
        super().pause_writing()
        if self._read_timer is None:
            self._check_reading(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """Stop checking that the client reads."""
        super().resume_writing()
        self._stop_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers, including uvicorn's keep-alive timer, which it leaves running."""
        self._stop_read_timer()
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
        return self._head_bytes > MAX_HEAD_BYTES or self._head_lines > MAX_HEAD_LINES

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._is_too_large:
            raise ValueError("the parser reports this as an invalid request")

    def _refuse_head(self) -> None:
        request_id = request_id_of(None)
        scope = {"path": "*", "request_id": request_id}
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
        _log.info("431 head too large", request_id=request_id)
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

    def _check_reading(self, before: int) -> None:
        """Disconnect a client that read nothing since `before` bytes were waiting."""
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            _log.warning("disconnected: the client stopped reading", waiting_bytes=waiting)
            self.transport.abort()
            return
        self._read_timer = self.loop.call_later(self.stall_seconds, self._check_reading, waiting)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
