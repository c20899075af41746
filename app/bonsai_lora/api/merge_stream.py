"""The streamed merge: read, compute and send concurrently.

A client that sends everything before it reads would deadlock a server that reads only as fast as
it can send. So reading and sending are separate tasks with a spool between them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
from starlette.types import Send

from bonsai_lora.api.body import BodyReader
from bonsai_lora.api.spool import Spool
from bonsai_lora.errors import StalledError
from bonsai_lora.service.merge import WeightMerge
from bonsai_lora.service.work import Lane

_FIRST_BYTES = 1 << 20


@dataclass(eq=False)
class MergeStream:
    """The response body: `prefix`, then the merged bytes of the weights read from `reader`.

    Nothing is sent before the whole body or its first megabyte is merged, so that an invalid
    short body still gets an error response. After that, an error aborts the response.
    """

    merge: WeightMerge
    reader: BodyReader
    prefix: bytes
    media_type: str
    lane: Lane
    spool: Spool
    on_bytes: Callable[[int], None]
    _error: Exception | None = field(default=None, init=False)

    async def run(self, send: Send) -> None:
        """Send the response; raises the errors of the body and StalledError."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._produce, tasks.cancel_scope)
                await self._consume(send)
                tasks.cancel_scope.cancel()
        finally:
            self.spool.close()
        if self._error is not None:
            raise self._error

    async def _produce(self, scope: anyio.CancelScope) -> None:
        try:
            for block, size in self.merge.blocks():
                raw = await self.reader.read_exactly(size)
                merged = await self.lane.run(self.merge.merge_block, block, raw)
                await self.spool.put(merged)
                self.on_bytes(size)
            await self.reader.expect_end()
            self.spool.end()
        except StalledError as error:  # the consumer is blocked by a client that stopped reading
            self._error = error
            scope.cancel()
        except Exception as error:  # noqa: BLE001 - raised again in the consumer
            self.spool.end(error)

    async def _consume(self, send: Send) -> None:
        try:
            await self.spool.ready(min(_FIRST_BYTES, self.merge.total_bytes + 1))
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            if self.prefix:
                await _send_part(send, self.prefix)
            async for block in self.spool.blocks():
                await _send_part(send, block)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception as error:  # noqa: BLE001 - raised outside the task group, unwrapped
            self._error = error

    def _headers(self) -> list[tuple[bytes, bytes]]:
        length = len(self.prefix) + self.merge.total_bytes
        return [
            (b"content-type", self.media_type.encode()),
            (b"content-length", b"%d" % length),
        ]


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
