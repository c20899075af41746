"""Answer connections that would take the last file descriptors."""

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from bonsai_lora.api.errors import problem_response
from bonsai_lora.api.middleware import request_id_of
from bonsai_lora.errors import TooManyFilesError

_LINGER_SECONDS = 1.0


class RefusedConnection(asyncio.Protocol):
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
    refusal = problem_response(TooManyFilesError(), {"path": "*", "request_id": request_id})
    lines = [
        *refusal.raw_headers,
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    head = b"".join(b"%b: %b\r\n" % line for line in lines)
    return STATUS_LINE[refusal.status_code] + head + b"\r\n" + bytes(refusal.body)
