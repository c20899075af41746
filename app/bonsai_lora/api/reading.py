"""Disconnect clients that read their responses too slowly."""

import asyncio
from functools import partial

import structlog

from bonsai_lora.api.pace import Pace

_log = structlog.get_logger("bonsai_lora.requests")


class ReadingTimeout:
    """Aborts a connection whose client reads at less than the `pace`.

    So does one whose client has not read the last of a response `stall_seconds` of the pace after
    the connection was closed here.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, pace: Pace
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._pace = pace
        self._timer: asyncio.TimerHandle | None = None
        """Runs while the client has to read."""
        self._since = 0.0
        self._unread_bytes = 0
        """Bytes that the client had not read at `_since`."""
        self._close_timer: asyncio.TimerHandle | None = None
        self._check_closing(was_closing=False)

    def start(self) -> None:
        """Start the timeout for reading enough."""
        self._since = self._loop.time()
        self._unread_bytes = self._transport.get_write_buffer_size()
        self._timer = self._loop.call_later(self._pace.left_seconds, self._check)

    def stop(self) -> None:
        """Count what the client has read since `start`, and stop the timeout."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            waited = self._loop.time() - self._since
            self._pace.note(waited, self._unread_bytes - self._transport.get_write_buffer_size())

    def close(self) -> None:
        """Stop all timers."""
        for timer in (self._timer, self._close_timer):
            if timer is not None:
                timer.cancel()

    def _check(self) -> None:
        """Disconnect the client if it has not read enough in time."""
        self.stop()
        if self._pace.left_seconds > 0:
            self.start()
        else:
            self._disconnect()

    def _check_closing(self, *, was_closing: bool) -> None:
        """Disconnect a client that does not read the rest of a response after the close."""
        is_closing = self._transport.get_write_buffer_size() > 0 and self._transport.is_closing()
        if is_closing and was_closing and self._timer is None:
            self._disconnect()
            return
        check = partial(self._check_closing, was_closing=is_closing)
        self._close_timer = self._loop.call_later(self._pace.stall_seconds, check)

    def _disconnect(self) -> None:
        unread = self._transport.get_write_buffer_size()
        _log.warning("disconnected: the client read too slowly", unread_bytes=unread)
        self._transport.abort()
