"""Where requests are computed: two lanes, so that long work never delays short work.

Applies and deletions are short; uploads, new matrices, merges, large headers and norms are long. A
lane has places for requests and threads of its own.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from bonsai_lora.errors import BusyError

T = TypeVar("T")

INLINE_NANOSECONDS = 500_000
"""Work up to this runs immediately."""
LOOP_NANOSECONDS = 8_000_000
"""Work up to this runs on the event loop, one piece per iteration."""
LOOP_NANOSECONDS_WITH_SPARE_CORES = 1_000_000
"""The same if worker threads have cores to themselves: arithmetic releases the GIL."""


class Lane:
    """Admits requests to `places`, and runs their work in `threads`."""

    def __init__(self, name: str, places: int, threads: int) -> None:
        self.name = name
        self.in_progress = 0
        """Number of admitted requests."""
        self.waiting = 0
        """Number of pieces of work that are in a thread or wait for one."""
        self._places = places
        self._threads = ThreadPoolExecutor(threads, name)

    def admit(self) -> "Lane":
        """Return a context manager that admits a request: it calls `enter` and `leave`."""
        return self

    def enter(self) -> None:
        """Admit a request; raises BusyError if all places are taken."""
        self.check()
        self.in_progress += 1

    def check(self) -> None:
        """Raise BusyError if all places are taken."""
        if self.in_progress >= self._places:
            raise BusyError(
                f"{self._places} requests are in progress, which is the limit; retry in a second",
                limit=self._places,
            )

    def leave(self) -> None:
        """Free the place of a request."""
        self.in_progress -= 1

    __enter__ = enter

    def __exit__(self, *_: object) -> None:
        self.leave()

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread and return its result."""
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self.waiting -= 1

    async def run_each(self, works: Sequence[Callable[[], T]], at_once: int) -> list[T]:
        """Run each of `works` in a thread, `at_once` at a time, and return their results.

        Other work gets its turn in between. After an error none of the rest is started, and the
        error is raised when those that run have ended.
        """
        results: dict[int, T] = {}
        pending = deque(enumerate(works))

        async def run_some() -> None:
            while pending:
                index, work = pending.popleft()
                try:
                    results[index] = await self.run(work)
                except BaseException:
                    pending.clear()
                    raise

        done = await asyncio.gather(*(run_some() for _ in range(at_once)), return_exceptions=True)
        for error in done:
            if error is not None:
                raise error
        return [results[index] for index in range(len(works))]


class Place:
    """A request's place in a lane: taken when it is first needed, and freed with the context."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._is_taken = False

    def take(self) -> None:
        """Take the place, once; raises BusyError if all are taken."""
        if not self._is_taken:
            self._lane.enter()
            self._is_taken = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_taken:
            self._lane.leave()


class ShortLane(Lane):
    """A lane that runs the shortest work immediately, and short work on the event loop."""

    def __init__(self, places: int, threads: int, *, has_spare_cores: bool) -> None:
        super().__init__("short", places, threads)
        self._loop_nanoseconds = (
            LOOP_NANOSECONDS_WITH_SPARE_CORES if has_spare_cores else LOOP_NANOSECONDS
        )
        self._turns: deque[asyncio.Future[None]] = deque()

    async def run(self, work: Callable[[], T], nanoseconds: float = math.inf) -> T:
        """Run `work`, which is estimated to take `nanoseconds`, and return its result."""
        if nanoseconds > self._loop_nanoseconds:
            return await super().run(work)
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
