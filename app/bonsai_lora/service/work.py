"""Schedule work: short pieces inline, longer ones in turns on the event loop or in threads."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bonsai_lora.errors import BusyError

T = TypeVar("T")

INLINE_NANOSECONDS = 500_000
"""Work up to this runs immediately."""
LOOP_NANOSECONDS = 8_000_000
"""Work up to this runs on the event loop, one piece per iteration."""
LOOP_NANOSECONDS_WITH_SPARE_CORES = 1_000_000
"""The same if worker threads have cores to themselves: arithmetic releases the GIL."""


class WorkPool:
    """Admits up to `max_concurrency` requests, and runs their work inline or in `threads`."""

    def __init__(self, max_concurrency: int, threads: int, *, has_spare_cores: bool) -> None:
        self._loop_nanoseconds = (
            LOOP_NANOSECONDS_WITH_SPARE_CORES if has_spare_cores else LOOP_NANOSECONDS
        )
        self._free = max_concurrency
        self._max = max_concurrency
        self._threads = ThreadPoolExecutor(threads, "work")
        self._turns: deque[asyncio.Future[None]] = deque()

    @property
    def in_progress(self) -> int:
        """Number of admitted requests."""
        return self._max - self._free

    def admit(self) -> "WorkPool":
        """Return a context manager that admits a request.

        Entering it raises BusyError if `max_concurrency` requests are in progress.
        """
        return self

    def __enter__(self) -> None:
        if self._free <= 0:
            raise BusyError(
                f"{self._max} requests are in progress, which is the limit; retry in a second",
                limit=self._max,
            )
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1

    async def run(self, work: Callable[[], T], nanoseconds: float = math.inf) -> T:
        """Run `work`, which is estimated to take `nanoseconds`, and return its result."""
        if nanoseconds > self._loop_nanoseconds:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        if nanoseconds > INLINE_NANOSECONDS:
            await self._turn()
        return work()

    async def _turn(self) -> None:
        """Wait until the event loop has polled its sockets since the last turn.

        Without turns, work that becomes ready together would run back to back, and no response
        would be sent before all of it is done.
        """
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._turns.append(turn)
        if len(self._turns) == 1:
            loop.call_soon(self._next_turn, loop)
        await turn

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        turn = self._turns.popleft()
        if not turn.done():
            turn.set_result(None)
        if self._turns:
            loop.call_soon(self._next_turn, loop)
