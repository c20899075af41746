"""Where work is done: small pieces on the event loop, large ones in a few threads."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import anyio
import anyio.to_thread

from app.errors import BusyError

T = TypeVar("T")

INLINE_COST = 1_500_000
"""Multiply-adds, or input bytes times ten, below which work stays on the event loop: under a
millisecond here, against about 0.1 ms for the way through a thread."""


class WorkPool:
    """Admits up to `max_concurrency` requests and runs `threads` pieces of work at a time."""

    def __init__(self, max_concurrency: int, threads: int) -> None:
        self._free = max_concurrency
        self._max = max_concurrency
        self._limiter = anyio.CapacityLimiter(threads)

    @property
    def in_progress(self) -> int:
        """Number of places held."""
        return self._max - self._free

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one of the places; raises BusyError at once where none is free."""
        if self._free <= 0:
            raise BusyError(
                f"{self._max} requests are in progress, which is the limit; try again in a second",
                limit=self._max,
            )
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1

    async def run(self, work: Callable[[], T], *, cost: int = INLINE_COST) -> T:
        """Return what `work` returns: at once for a small cost, else from a worker thread."""
        if cost < INLINE_COST:
            return work()
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)
