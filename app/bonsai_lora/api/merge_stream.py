"""The streamed merge: read, compute and send concurrently.

A client that sends everything before it reads would deadlock a server that reads only as fast as
it can send. So reading and sending are separate tasks with a spool between them.
"""

from collections.abc import Callable
from functools import partial

import anyio
from starlette.types import Send

from bonsai_lora.api.body import BodyReader
from bonsai_lora.api.spool import Spool
from bonsai_lora.errors import StalledError
from bonsai_lora.service.merge import WeightMerge
from bonsai_lora.service.work import WorkPool

_FIRST_BYTES = 1 << 20


class MergeStream:
    """The response body: `prefix`, then the merged bytes of the weights read from `reader`.

    Nothing is sent before the whole body or its first megabyte is merged, so that an invalid
    short body still gets an error response. After that, an error aborts the response.
    """

    def __init__(
        self,
        merge: WeightMerge,
        reader: BodyReader,
        prefix: bytes,
        media_type: str,
        *,
        pool: WorkPool,
        spool: Spool,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._merge = merge
        self._reader = reader
        self._prefix = prefix
        self._media_type = media_type
        self._pool = pool
        self._spool = spool
        self._on_bytes = on_bytes
        self._error: Exception | None = None

    async def run(self, send: Send) -> None:
        """Send the response; raises the errors of the body and StalledError."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._produce, tasks.cancel_scope)
                await self._consume(send)
                tasks.cancel_scope.cancel()
        finally:
            self._spool.close()
        if self._error is not None:
            raise self._error

    async def _produce(self, scope: anyio.CancelScope) -> None:
        try:
            for block, size in self._merge.blocks():
                raw = await self._reader.read_exactly(size)
                merged = await self._pool.run(partial(self._merge.merge_block, block, raw))
                await self._spool.put(merged)
                self._on_bytes(size)
            await self._reader.expect_end()
            self._spool.end()
        except StalledError as error:  # the consumer is blocked by a client that stopped reading
            self._error = error
            scope.cancel()
        except Exception as error:  # noqa: BLE001 - raised again in the consumer
            self._spool.end(error)

    async def _consume(self, send: Send) -> None:
        try:
            await self._spool.ready(min(_FIRST_BYTES, self._merge.total_bytes + 1))
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            if self._prefix:
                await _send_part(send, self._prefix)
            async for block in self._spool.blocks():
                await _send_part(send, block)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception as error:  # noqa: BLE001 - raised outside the task group, unwrapped
            self._error = error

    def _headers(self) -> list[tuple[bytes, bytes]]:
        length = len(self._prefix) + self._merge.total_bytes
        return [
            (b"content-type", self._media_type.encode()),
            (b"content-length", str(length).encode()),
        ]


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
