"""A bounded queue of byte blocks that spills to disk when its consumer is slow."""

import os
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, TypeVar

import anyio
import anyio.to_thread

from bonsai_lora.errors import StalledError, StoreFullError
from bonsai_lora.service.budget import Budget

T = TypeVar("T")

MEMORY_BYTES = 4 << 20
"""Most bytes that one spool holds in memory before it writes to disk."""

_PIECE_BYTES = 1 << 20


class Spool:
    """A FIFO of blocks, in memory first, then in a temporary file of bounded size.

    One task puts, one iterates. When memory and file are full, or all spools together take the
    `disk` budget, `put` waits for the consumer for at most `stall_seconds`. `close` releases both.
    """

    def __init__(self, disk: Budget, stall_seconds: float, folder: Path) -> None:
        self._disk = disk
        self._max_disk = disk.total_bytes
        self._taken = 0
        """Length of the file, which is reserved from `disk`."""
        self._stall = stall_seconds
        self._folder = folder
        self._memory: deque[bytes | bytearray] = deque()
        self._memory_bytes = 0
        self._file: IO[bytes] | None = None
        self._written = 0
        self._read = 0
        self._ended = False
        self._error: Exception | None = None
        self._changed = anyio.Event()

    async def put(self, block: bytes | bytearray) -> None:
        """Append a block.

        Raises StalledError if the consumer stalls, StoreFullError if the disk is full.
        """
        await self._wait(lambda: self._fits_memory(len(block)) or self._fits_disk(len(block)))
        if self._fits_memory(len(block)):
            self._memory.append(block)
            self._memory_bytes += len(block)
        else:
            try:
                await anyio.to_thread.run_sync(self._write, block)
            except OSError as error:
                raise StoreFullError(
                    f"the merge cannot be buffered on disk: {error}; free disk space, or read the "
                    "response while sending"
                ) from None
        self._signal()

    def end(self, error: Exception | None = None) -> None:
        """Mark the end; `error` is raised in the consumer after the last block."""
        self._ended = True
        self._error = error
        self._signal()

    async def ready(self, size: int) -> None:
        """Wait until `size` bytes or the end are available; raises the producer's error."""
        await self._wait_forever(
            lambda: self._ended or self._memory_bytes + self._written - self._read >= size
        )
        if self._error:
            raise self._error

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield all blocks until the end; raises the producer's error."""
        while True:
            await self._wait_forever(lambda: self._ended or not self._drained)
            if self._memory:
                block = self._memory.popleft()
                self._memory_bytes -= len(block)
            elif self._written > self._read:
                block = await anyio.to_thread.run_sync(self._read_piece)
            elif self._error:
                raise self._error
            else:
                return
            self._signal()
            yield bytes(block)

    def close(self) -> None:
        """Release memory and disk."""
        self._memory.clear()
        if self._file is not None:
            self._file.close()
        self._disk.release(self._taken)
        self._taken = 0

    def _fits_memory(self, size: int) -> bool:
        """Return whether a block fits in memory; while blocks are on disk, none does."""
        return self._written == self._read and self._memory_bytes + size <= MEMORY_BYTES

    def _fits_disk(self, size: int) -> bool:
        """Return whether a block fits in the file, whose growth is reserved then."""
        if self._written == self._read:  # rewind, so that the file stays short
            self._written = self._read = 0
        if self._written - self._read + size > self._max_disk:
            return False
        growth = max(0, min(self._written + size, self._max_disk) - self._taken)
        if not self._disk.try_reserve(growth):
            return False
        self._taken += growth
        return True

    @property
    def _drained(self) -> bool:
        return not self._memory and self._written == self._read

    # The next two run in threads concurrently, so they must not share a file position.

    def _write(self, block: bytes | bytearray) -> None:
        """Append to the file, which is a ring buffer of max_disk bytes."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - see close()
        view = memoryview(block)
        while view:
            start = self._written % self._max_disk
            count = os.pwrite(self._file.fileno(), view[: self._max_disk - start], start)
            self._written += count
            view = view[count:]

    def _read_piece(self) -> bytes:
        assert self._file is not None
        start = self._read % self._max_disk
        size = min(_PIECE_BYTES, self._written - self._read, self._max_disk - start)
        piece = os.pread(self._file.fileno(), size, start)
        self._read += len(piece)
        return piece

    def _signal(self) -> None:
        """Wake waiting tasks, which check their condition again."""
        self._changed.set()
        self._changed = anyio.Event()

    async def _wait_forever(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        try:
            while not condition():
                with anyio.fail_after(self._stall):
                    await self._changed.wait()
        except TimeoutError:
            held = self._written - self._read + self._memory_bytes
            raise StalledError(
                f"the client has {held} bytes of its response to read, for which there is no more "
                f"room, and read nothing for {self._stall:g} s; read the response while sending, "
                "or send smaller weights"
            ) from None
