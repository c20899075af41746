"""Accept connections: many in a turn of the event loop, and none that would take the last files."""

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from bonsai_lora.api.refused_connection import RefusedConnection

_ACCEPTED_AT_ONCE = 64
"""Most connections accepted in one turn of the event loop. libuv accepts one, and new connections
then wait for seconds in an overload; without a limit, one worker could take them all."""
_RESERVED = 64
"""File descriptors that connections leave to files: sets and bases need them to be opened."""
_LEAST = 40
"""While fewer descriptors than this are left, connections wait in the backlog."""
_REST_SECONDS = 0.1
_GONE = (errno.ECONNABORTED, errno.EPROTO)
"""The client went away before it was accepted."""

_log = logging.getLogger("bonsai_lora")


class Server(uvicorn.Server):
    """uvicorn's server, with an `Acceptor` for each socket.

    `handshake_seconds` is how long a TLS handshake may take, and the end of a TLS connection.
    After SIGTERM it calls `drain`, and goes on for `drain_seconds`. It ends when its parent process
    is gone.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        handshake_seconds: float,
        drain_seconds: float,
        drain: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._handshake_seconds = handshake_seconds
        self._drain_seconds = drain_seconds
        self._drain = drain
        self._is_draining = False
        self._parent = os.getppid()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; called ten times a second."""
        if os.getppid() != self._parent:
            self.should_exit = True  # the signal for it came too early, or this is not Linux
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain after the first SIGTERM; end after any other signal, and after a second one."""
        if sig == signal.SIGTERM and self._drain_seconds and not self._is_draining:
            self._is_draining = True
            self._drain()
            timer = threading.Timer(self._drain_seconds, super().handle_exit, (sig, frame))
            timer.daemon = True  # a second signal ends the process before
            timer.start()
        else:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections."""
        await super().startup(sockets=[])
        options: dict[str, Any] = {}
        if self.config.ssl is not None:
            options["ssl"] = self.config.ssl
            options["ssl_handshake_timeout"] = self._handshake_seconds
            options["ssl_shutdown_timeout"] = self._handshake_seconds
        self.servers = [Acceptor(one, self._connect, options) for one in sockets or []]  # type: ignore[misc]

    def _connect(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


class Acceptor:
    """Accepts the connections of `listener`, a non-blocking socket, until `close`.

    Each has a protocol of `connect`; `options` are those of `loop.connect_accepted_socket`.
    """

    def __init__(
        self,
        listener: socket.socket,
        connect: Callable[[], asyncio.BaseProtocol],
        options: dict[str, Any],
    ) -> None:
        self._listener = listener
        self._connect = connect
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._opening: set[asyncio.Task[Any]] = set()
        """Connections that are not open yet, such as those in a TLS handshake."""
        self._timer: asyncio.TimerHandle | None = None
        self._start()

    def close(self) -> None:
        """Stop accepting."""
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()
        for one in self._opening:
            one.cancel()

    async def wait_closed(self) -> None:
        """Wait until nothing is left of connections that were not open yet."""
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _GONE:
                    continue
                _log.warning("no connection can be accepted: %s", error.strerror)
                self._rest()
                return
            free = self._limit - connection.fileno()  # which was the lowest free number
            self._open(connection, self._connect if free > _RESERVED else RefusedConnection)
            if free < _LEAST:
                self._rest()
                return

    def _open(self, connection: socket.socket, connect: Callable[[], asyncio.BaseProtocol]) -> None:
        connection.setblocking(False)
        opening = self._loop.connect_accepted_socket(connect, connection, **self._options)
        task = self._loop.create_task(opening)
        self._opening.add(task)
        task.add_done_callback(self._note_open)

    def _note_open(self, task: asyncio.Task[Any]) -> None:
        self._opening.discard(task)
        if not task.cancelled():
            task.exception()  # a handshake that failed; the connection is closed

    def _rest(self) -> None:
        """Accept nothing for a moment; connections wait in the backlog."""
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(_REST_SECONDS, self._start)

    def _start(self) -> None:
        self._loop.add_reader(self._listener, self._accept)
