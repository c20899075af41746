"""Where requests are computed: two lanes, so that long work never delays short work.

Applies and deletions are short; uploads, new matrices, merges, large headers and norms are long. A
lane has places for requests and threads of its own.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic
from typing import Self, TypeVar

from bonsai_lora.errors import BusyError

T = TypeVar("T")

INLINE_NANOSECONDS = 500_000
"""Work up to this runs immediately."""
LOOP_NANOSECONDS = 8_000_000
"""Work up to this runs on the event loop, one piece per iteration."""
LOOP_NANOSECONDS_WITH_SPARE_CORES = 1_000_000
"""The same if worker threads have cores to themselves: arithmetic releases the GIL."""

_LATE_SECONDS = 10.0
"""How long a request is sure of its place."""
_LATE_PER_PLACE = 4
"""Most requests that go on without a place, for each place."""


class Lane:
    """Admits requests to `places`, and runs their work in `threads`."""

    def __init__(self, name: str, places: int, threads: int) -> None:
        self.name = name
        self.waiting = 0
        """Number of pieces of work that are in a thread or wait for one."""
        self.crowded_at = -math.inf
        """When a request was last refused because of clients that take long (monotonic)."""
        self._places = places
        self._holders: dict[object, float] = {}
        """When each request with a place took it, the oldest first."""
        self._late: set[object] = set()
        """Requests that took so long that they had to give up their places."""
        self._threads = ThreadPoolExecutor(threads, name)

    @property
    def in_progress(self) -> int:
        """Number of admitted requests."""
        return len(self._holders) + len(self._late)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Admit a request; raises BusyError if all places are taken."""
        with Place(self) as place:
            place.take()
            yield

    def enter(self, holder: object) -> None:
        """Give a place to `holder`, which has none; raises BusyError if all are taken."""
        self.check()
        self._holders[holder] = monotonic()

    def check(self) -> None:
        """Raise BusyError if all places are taken."""
        if len(self._holders) >= self._places and not self._make_room():
            raise BusyError(
                f"{self._places} requests are in progress, which is the limit; retry in a second",
                limit=self._places,
            )

    def leave(self, holder: object) -> None:
        """Free the place of `holder`."""
        if self._holders.pop(holder, None) is None:
            self._late.discard(holder)

    def _make_room(self) -> bool:
        """Free the place that was taken first, if that is long ago; return whether it was.

        A client may send and read as slowly as it likes, within the stall timeout, so that a few
        would have all places for hours. Its request goes on without one.
        """
        oldest, taken_at = next(iter(self._holders.items()))
        now = monotonic()
        if now - taken_at < _LATE_SECONDS:
            return False
        if len(self._late) >= _LATE_PER_PLACE * self._places:
            self.crowded_at = now
            return False
        del self._holders[oldest]
        self._late.add(oldest)
        return True

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
            self._lane.enter(self)
            self._is_taken = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_taken:
            self._lane.leave(self)


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
