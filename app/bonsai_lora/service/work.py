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
from functools import partial
from time import monotonic
from typing import ParamSpec, Self, TypeVar

from bonsai_lora.errors import BusyError, counted

P = ParamSpec("P")
T = TypeVar("T")

INLINE_NANOSECONDS = 500_000
"""Requests of one connection up to this are computed immediately, one after the other."""
ITERATION_NANOSECONDS = 1_000_000
"""Work up to this in all runs in one iteration of the event loop, and at least one piece."""
LOOP_NANOSECONDS = 8_000_000
"""Work up to this runs on the event loop."""
_COUNTED_NANOSECONDS = 20_000
"""Shorter work is not counted, which would take longer than it is worth."""
LOOP_NANOSECONDS_WITH_SPARE_CORES = 1_000_000
"""The same if worker threads have cores to themselves: arithmetic releases the GIL."""

_LATE_SECONDS = 10.0
"""How long a request is sure of its place."""
LATE_PER_PLACE = 4
"""Most requests of clients that go on without a place, for each place."""

_RETRIES_PER_PLACE = 2
"""How many a second may be told to retry in a second, for each place."""
_MOST_RETRY_SECONDS = 15


class Lane:
    """Admits requests to `places`, and runs their work in `threads`.

    `late_per_place` bounds the requests that go on without a place, for each place.
    """

    def __init__(
        self, name: str, places: int, threads: int, late_per_place: int = LATE_PER_PLACE
    ) -> None:
        self.name = name
        self.waiting = 0
        """Number of pieces of work that are in a thread or wait for one."""
        self.crowded_at = -math.inf
        """When a request was last refused because of slow clients (monotonic)."""
        self._places = places
        self._most_late = late_per_place * places
        self._holders: dict[object, float] = {}
        """When each request with a place took it, the oldest first."""
        self._second = 0
        self._refused = self._refused_before = 0
        """Requests refused in that second, and in the one before in which some were."""
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
            seconds = self._retry_seconds()
            raise BusyError(
                f"{self._places} requests are in progress, which is the limit; retry in "
                f"{counted(seconds, 'second')}",
                limit=self._places,
                retry_seconds=seconds,
            )

    def _retry_seconds(self) -> int:
        """Return when to retry: later, and not all at once, if many are refused.

        Otherwise those that are refused again and again take the time of those that are served.
        """
        second = int(monotonic())
        if second != self._second:
            self._second, self._refused_before, self._refused = second, self._refused, 0
        self._refused += 1
        crowd = max(self._refused, self._refused_before) // (_RETRIES_PER_PLACE * self._places)
        shortest = min(1 + crowd, _MOST_RETRY_SECONDS)
        return shortest + self._refused % shortest

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
        if len(self._late) >= self._most_late:
            self.crowded_at = now
            return False
        del self._holders[oldest]
        self._late.add(oldest)
        return True

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` in a thread and return its result."""
        self.waiting += 1
        try:
            call = partial(work, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
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
        self._spent = 0.0
        """Nanoseconds of work in this iteration of the event loop, as far as it is counted."""
        self._is_counting = False
        """Whether `_next_iteration` is to be called."""
        self._turns: deque[tuple[asyncio.Future[None], float]] = deque()
        """Work that waits for an iteration, and its nanoseconds."""

    async def run_estimated(self, work: Callable[[], T], nanoseconds: float) -> T:
        """Run `work`, which is estimated to take `nanoseconds`, and return its result."""
        if nanoseconds > self._loop_nanoseconds:
            return await self.run(work)
        if nanoseconds > _COUNTED_NANOSECONDS and not self._fits(nanoseconds):
            turn = asyncio.get_running_loop().create_future()
            self._turns.append((turn, nanoseconds))
            await turn
        return work()

    def _fits(self, nanoseconds: float) -> bool:
        """Count work, and return whether it may run in this iteration.

        Without this, work that becomes ready together would run back to back, and until all of it
        is done, no response would be sent, and no connection accepted.
        """
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._next_iteration)
        if self._turns or self._spent + nanoseconds > ITERATION_NANOSECONDS:
            return False
        self._spent += nanoseconds
        return True

    def _next_iteration(self) -> None:
        """Let the work that has waited longest run: one piece, and more if they are short."""
        self._spent = 0.0
        while self._turns:
            turn, nanoseconds = self._turns[0]
            if self._spent and self._spent + nanoseconds > ITERATION_NANOSECONDS:
                break
            self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                self._spent += nanoseconds
        self._is_counting = bool(self._spent)
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._next_iteration)
