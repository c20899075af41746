"""Serve a computed file: the next pieces are computed while the current one is sent."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from typing import Protocol

from bonsai_lora.service.budget import Budget, Reservation


class ComputedFile(Protocol):
    """A file that exists nowhere, such as a merged model's; any of its bytes can be computed."""

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        ...

    @property
    def etag(self) -> str:
        """Strong ETag."""
        ...

    @property
    def media_type(self) -> str:
        """Content-Type of the file."""
        ...

    def pieces(self, start: int, stop: int) -> Iterator[Callable[[], memoryview]]:
        """Yield what computes the bytes [start, stop), in order."""
        ...


class StreamedFile:
    """A computed file for `file_response`, computed in `executor` up to `ahead` pieces ahead."""

    def __init__(self, file: ComputedFile, executor: Executor, ahead: int) -> None:
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
        self, file: ComputedFile, executor: Executor, memory: Budget, working_bytes: int
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
