"""The sockets that `serve` listens on: a TCP port, a Unix socket, or both."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from bonsai_lora.settings import Settings

_BACKLOG = 2048
_SOCKET_UMASK = 0o117
"""Gives a new socket the mode 0660."""
_WAIT_SECONDS = 5.0


class ListenError(Exception):
    """A socket cannot be opened; the message is meant for the user."""


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[list[socket.socket]]:
    """Open the listening sockets of `settings`; the Unix socket's file is removed on exit.

    They never block: the flag belongs to the socket that all workers share, so a worker that made
    its copies blocking for an instant would leave another one waiting in accept(2).

    Raises ListenError if one cannot be opened, and closes the others.
    """
    with contextlib.ExitStack() as stack:
        sockets = []
        port = settings.tcp_port()
        if port is not None:
            sockets.append(stack.enter_context(_listen_tcp(settings.host, port)))
        if settings.uds is not None:
            sockets.append(stack.enter_context(_listening_unix(settings.uds.absolute())))
        for one in sockets:
            one.setblocking(False)
        yield sockets


def address_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the address of a listener, as a URL or `unix:PATH`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _listen_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another address "
            "with --host and --port"
        ) from error
    return listener


@contextlib.contextmanager
def _listening_unix(path: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        try:
            with _locked(path.parent):
                _remove_stale(path)
                _bind(listener, path)
                made = _identity(path)
        except OSError as error:
            raise ListenError(
                f"cannot listen on the Unix socket {path}: {error.strerror or error}; choose "
                "another path with --uds"
            ) from error
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if _identity(path) == made:  # not if another process has replaced it
                    path.unlink()


def _bind(listener: socket.socket, path: Path) -> None:
    """Bind to `path` and listen; only the owner and the group can connect, from the start."""
    before = os.umask(_SOCKET_UMASK)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)


def _remove_stale(path: Path) -> None:
    """Remove a socket that no process listens on; raises OSError for anything else at `path`."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "the path is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_WAIT_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another process is listening on it")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, so that processes starting together do not replace each other's socket."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
