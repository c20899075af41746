"""Serve a computed file: the next pieces are computed while the current one is sent."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Executor

from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.merged_files import GGUF_DTYPES, SAFETENSORS_DTYPES
from bonsai_lora.checkpoints.parts import MergedFile
from bonsai_lora.service.budget import Budget, Reservation
from bonsai_lora.service.gain import Gains


def gain_headers(
    gains: Gains, model: MergedModel, file: str, dtype: str | None = None
) -> dict[str, str]:
    """Return the header with what a merged file keeps of the deltas, once that is known.

    `dtype` is that of changed tensors of a GGUF base, if one is given.
    """
    if not model.etags:
        return {}
    if model.base.format == "gguf":
        default = GGUF_DTYPES if file.endswith(".gguf") else SAFETENSORS_DTYPES
        dtype = dtype or default[0]
    gain = gains.known(model, dtype)
    return {} if gain is None else {"Bonsai-Delta-Gain": f"{gain:.4f}"}


class StreamedFile:
    """A computed file for `file_response`, computed in `executor` up to `ahead` pieces ahead."""

    def __init__(self, file: MergedFile, executor: Executor, ahead: int) -> None:
        self.size_bytes = file.size_bytes
        self.etag = file.etag
        self.media_type = file.media_type
        self._file = file
        self._executor = executor
        self._ahead = ahead

    async def read(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """Yield the bytes [start, stop) in pieces of about a megabyte."""
        loop = asyncio.get_running_loop()
        pieces = self._file.pieces(start, stop)
        pending: deque[asyncio.Future[memoryview]] = deque()
        try:
            for piece in pieces:
                pending.append(loop.run_in_executor(self._executor, piece))
                if len(pending) > self._ahead:
                    yield await pending.popleft()
            while pending:
                yield await pending.popleft()
        finally:
            for one in pending:
                one.cancel()


class CountedFile(StreamedFile):
    """A computed file with large pieces: one is computed while one is sent.

    `working_bytes` of `memory` are reserved while it is read.
    """

    def __init__(
        self, file: MergedFile, executor: Executor, memory: Budget, working_bytes: int
    ) -> None:
        super().__init__(file, executor, 0)
        self._memory = memory
        self._working_bytes = working_bytes

    async def read(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """Yield the bytes [start, stop); raises BusyError, MemoryBudgetError before the first."""
        with Reservation(self._memory) as reserved:
            reserved.add(self._working_bytes)
            async for piece in super().read(start, stop):
                yield piece
