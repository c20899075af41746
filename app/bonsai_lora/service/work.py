"""Where work is done: small pieces at once, larger ones in turn, the largest in threads."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bonsai_lora.errors import BusyError

T = TypeVar("T")

AT_ONCE_NANOSECONDS = 500_000
"""Work up to this is done as soon as it is there."""
IN_TURN_NANOSECONDS = 8_000_000
"""Work up to this is done on the event loop, one piece between two looks at the sockets."""
SHARED_NANOSECONDS = 1_000_000
"""The same where threads have cores of their own: the arithmetic does not hold Python's lock."""


class WorkPool:
    """Admits up to `max_concurrency` requests and runs `threads` pieces of work at a time."""

    def __init__(self, max_concurrency: int, threads: int, *, has_spare_cores: bool) -> None:
        self._in_turn = SHARED_NANOSECONDS if has_spare_cores else IN_TURN_NANOSECONDS
        self._free = max_concurrency
        self._max = max_concurrency
        self._threads = ThreadPoolExecutor(threads, "work")
        self._turns: deque[asyncio.Future[None]] = deque()

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

    async def run(self, work: Callable[[], T], nanoseconds: float = math.inf) -> T:
        """Return what `work` returns, which takes so long by estimate."""
        if nanoseconds > self._in_turn:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        if nanoseconds > AT_ONCE_NANOSECONDS:
            await self._turn()
        return work()

    async def _turn(self) -> None:
        """Wait until the event loop has looked at its sockets since the last turn.

        Without this, work that becomes ready together is done together, and all its answers come
        late, instead of each when it is ready.
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
