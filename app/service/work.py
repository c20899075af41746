"""Where work is done: small pieces on the event loop, large ones in a few threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.errors import BusyError

T = TypeVar("T")


class WorkPool:
    """Admits up to `max_concurrency` requests and runs `threads` pieces of work at a time."""

    def __init__(self, max_concurrency: int, threads: int) -> None:
        self._free = max_concurrency
        self._max = max_concurrency
        self._threads = ThreadPoolExecutor(threads, "work")

    @property
    def in_progress(self) -> int:
        """Number of places held."""
        return self._max - self._free

    def admit(self) -> "WorkPool":
        """Return a context that holds one of the places.

        Entering it raises BusyError at once where none is free.
        """
        return self

    def __enter__(self) -> None:
        if self._free <= 0:
            raise BusyError(
                f"{self._max} requests are in progress, which is the limit; try again in a second",
                limit=self._max,
            )
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1

    async def run(self, work: Callable[[], T], *, inline: bool = False) -> T:
        """Return what `work` returns: from a worker thread, or at once where it is small."""
        if inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
