"""An HTTP server on a real socket that does exactly what a test tells it, one request after another."""

import contextlib
import socket
import threading
from http import HTTPStatus
from typing import NamedTuple


class Answer(NamedTuple):
    """An answer; with `sent`, the connection ends after so many bytes of the body."""

    status: int
    body: bytes
    headers: tuple[str, ...] = ()
    sent: int | None = None


DROP = object()
"""The connection is closed once the request head is there."""


class Scripted:
    """The server; `heads` and `bodies` are what it was sent."""

    def __init__(self, steps):
        self.heads, self.bodies = [], []
        self._steps = list(steps)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        for step in self._steps:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed: fewer connections than steps
                return
            with connection:
                self._serve(connection, step)

    def _serve(self, connection, step):
        connection.settimeout(10)
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        self.heads.append(head + b"\r\n")
        if step is DROP:
            return
        length = next(
            (int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")),
            0,
        )
        while len(body) < length:
            body += connection.recv(65536)
        self.bodies.append(body)
        lines = [f"HTTP/1.1 {step.status} {HTTPStatus(step.status).phrase}", *step.headers]
        lines += [f"Content-Length: {len(step.body)}", "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode() + step.body[: step.sent])

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def scripted(steps):
    """Give a server that takes a connection for each of `steps`: answers and DROP."""
    server = Scripted(steps)
    try:
        yield server
    finally:
        server.close()
