"""Refuse connections before file descriptors run out: sets and bases need them to be opened."""

import asyncio
import os
import resource
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from bonsai_lora.api.errors import problem_response, too_many_files
from bonsai_lora.api.middleware import request_id_of

_RESERVED = 32
"""Descriptors that connections leave to files."""
_LINGER_SECONDS = 1.0


def refusing_crowds(
    connect: Callable[..., asyncio.BaseProtocol],
) -> Callable[..., asyncio.BaseProtocol]:
    """Return a factory of protocols that calls `connect` while enough descriptors are left."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def make(*args: Any, **options: Any) -> asyncio.BaseProtocol:
        is_crowded = _lowest_free() + _RESERVED > limit
        return CrowdedConnection() if is_crowded else connect(*args, **options)

    return make


def _lowest_free() -> int:
    """Return the number of the next descriptor, which is at least the number of open ones."""
    try:
        descriptor = os.dup(2)
    except OSError:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.close(descriptor)
    return descriptor


class CrowdedConnection(asyncio.Protocol):
    """Answers whatever is sent with 503, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close soon, even if nothing is sent."""
        self._transport = cast("asyncio.Transport", transport)
        self._is_answered = False
        self._timer = asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.close)

    def data_received(self, _data: bytes) -> None:
        """Answer the first bytes, and drop the others: closing at once could reset the answer."""
        if not self._is_answered:
            self._is_answered = True
            self._transport.write(_answer())
            if self._transport.can_write_eof():  # TLS cannot
                self._transport.write_eof()

    def connection_lost(self, _error: Exception | None) -> None:
        """Stop the timer."""
        self._timer.cancel()


def _answer() -> bytes:
    request_id = request_id_of(None)
    refusal = problem_response(too_many_files(), {"path": "*", "request_id": request_id})
    lines = [
        *refusal.raw_headers,
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    head = b"".join(b"%b: %b\r\n" % line for line in lines)
    return STATUS_LINE[refusal.status_code] + head + b"\r\n" + bytes(refusal.body)
