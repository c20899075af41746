"""Work that outlasts its request: run here, and recorded where every worker can see it.

Jobs have a lane of their own, since a piece of theirs may take a minute, which other long work must
not wait for.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from bonsai_lora.errors import (
    BonsaiLoraError,
    InternalError,
    JobCancelledError,
    JobInterruptedError,
    JobNotFoundError,
)
from bonsai_lora.service.budget import Budget, Reservation
from bonsai_lora.service.keys import Key
from bonsai_lora.service.work import Lane
from bonsai_lora.storage.jobs import (
    HEARTBEAT_SECONDS,
    JobRecord,
    JobRecords,
    State,
    as_seen,
    failed,
    new_record,
)

AT_ONCE = 2
"""Jobs that run at the same time; the others are queued."""
LONG_NANOSECONDS = 1e9
"""What a GET may take before it becomes a job, if the caller prefers that."""
BEAT_SECONDS = 1.0
"""How often a runner writes its record, and looks whether the job is cancelled."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Progress:
    """How far a piece of long work is, and whether it should stop. Thread-safe."""

    def __init__(self) -> None:
        self.share = 0.0
        """From 0 to 1."""
        self.is_cancelled = False
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise JobCancelledError if the work should stop."""
        if self.is_cancelled:
            raise JobCancelledError

    def follow(
        self, works: Sequence[Callable[[], T]], sizes: Sequence[int]
    ) -> list[Callable[[], T]]:
        """Return `works` so that each checks before it begins, and counts its size at its end."""
        total = sum(sizes) or 1

        def followed(work: Callable[[], T], size: int) -> T:
            self.check()
            result = work()
            with self._lock:
                self.share = min(1.0, self.share + size / total)
            return result

        return [partial(followed, *one) for one in zip(works, sizes, strict=True)]


Work = Callable[[Progress], Awaitable[Mapping[str, Any]]]
"""Does the work of a job, and returns its result, which can be written as JSON."""


class Jobs:
    """Runs the jobs that this process has accepted, and finds those of all processes."""

    def __init__(self, records: JobRecords, lane: Lane, memory: Budget) -> None:
        self.lane = lane
        """Where jobs have places, and threads for their pieces."""
        self._records = records
        self._memory = memory
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._running: dict[str, Progress] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, key: Key, kind: str, needed_bytes: int, work: Work) -> JobRecord:
        """Accept a job, and return its record; it waits until the memory is there.

        Raises BusyError if too many are queued, MemoryBudgetError if the memory is never there, and
        the errors of a store that cannot be written to.
        """
        self._memory.check(needed_bytes)
        record = new_record(kind, key.id)
        self.lane.enter(record.id)
        try:
            await asyncio.to_thread(self._records.add, record)
        except BaseException:
            self.lane.leave(record.id)
            raise
        task = asyncio.create_task(self._run(record.id, needed_bytes, work), name=record.id)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return record

    async def get(self, key: Key, number: str) -> JobRecord:
        """Return a job of the caller; raises JobNotFoundError."""
        return _seen(key, number, await asyncio.to_thread(self._records.read, number))

    async def result(self, job: JobRecord) -> Mapping[str, Any] | None:
        """Return the result of a job that is done, else None."""
        if job.state != "done":
            return None
        return await asyncio.to_thread(self._records.read_result, job.id)

    async def cancel(self, key: Key, number: str) -> JobRecord:
        """Ask a job of the caller to stop, and return it; raises JobNotFoundError.

        A job that runs stops before its next piece of work; what it has stored by then stays.
        """
        await self.get(key, number)
        record = await asyncio.to_thread(self._records.update, number, _cancelled)
        if number in self._running:
            self._running[number].is_cancelled = True
        return _seen(key, number, record)

    async def page(self, key: Key, limit: int, cursor: str | None) -> list[JobRecord]:
        """Return up to `limit` jobs of the caller that are older than `cursor`, newest first."""
        return await asyncio.to_thread(self._page, key, limit, cursor)

    def _page(self, key: Key, limit: int, cursor: str | None) -> list[JobRecord]:
        found: list[JobRecord] = []
        for number in self._records.ids():
            if len(found) < limit and (cursor is None or number < cursor):
                with suppress(JobNotFoundError):
                    found.append(_seen(key, number, self._records.read(number)))
        return found

    async def stop(self) -> None:
        """Interrupt all jobs of this process, and record that they have failed."""
        for progress in self._running.values():
            progress.is_cancelled = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.lane.leave(task.get_name())
        if not task.cancelled() and task.exception() is not None:
            _log.error("the record of a job could not be written", exc_info=task.exception())

    async def _run(self, number: str, needed_bytes: int, work: Work) -> None:
        progress = self._running[number] = Progress()
        beat = asyncio.create_task(self._beat(number, progress))
        try:
            async with self._turns:
                end = await self._outcome(number, progress, needed_bytes, work)
        except asyncio.CancelledError:  # the service stops
            end = partial(failed, error=JobInterruptedError())
        finally:
            beat.cancel()
            del self._running[number]
        await self._finish(number, end)

    async def _finish(self, number: str, end: Callable[[JobRecord], JobRecord]) -> None:
        """Record how a job has ended; a store that is away is asked again for half a minute."""
        late = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            try:
                await asyncio.to_thread(self._records.update, number, end)
            except BonsaiLoraError:
                if time.monotonic() > late:
                    raise
                await asyncio.sleep(BEAT_SECONDS)
            else:
                return

    async def _outcome(
        self, number: str, progress: Progress, needed_bytes: int, work: Work
    ) -> Callable[[JobRecord], JobRecord]:
        """Do the work, and return the last change of its record."""
        try:
            with Reservation(self._memory) as reserved:
                while not reserved.try_add(needed_bytes):
                    await asyncio.sleep(BEAT_SECONDS)
                    progress.check()
                record = await asyncio.to_thread(self._records.update, number, _started)
                progress.is_cancelled |= record is None or record.is_finished
                progress.check()
                result = await work(progress)
                await asyncio.to_thread(self._records.write_result, number, result)
                return partial(replace, state="done", progress=1.0)
        except JobCancelledError:
            return partial(replace, state="cancelled")
        except BonsaiLoraError as error:
            return partial(failed, error=error)
        except Exception:  # noqa: BLE001 - logged, and recorded
            _log.exception("job %s failed", number)
            detail = f"the job failed for an unexpected reason; the log has it under {number}"
            return partial(failed, error=InternalError(detail))

    async def _beat(self, number: str, progress: Progress) -> None:
        """Write how far a job is once a second, and find out whether it is cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            change = partial(_beaten, share=progress.share)
            with suppress(BonsaiLoraError, OSError):  # the next beat may succeed
                record = await asyncio.to_thread(self._records.update, number, change)
                progress.is_cancelled |= record is None or record.is_cancelled


def _seen(key: Key, number: str, record: JobRecord | None) -> JobRecord:
    """Return the record that the caller may see; raises JobNotFoundError for a different key."""
    if record is None or not (record.key == key.id or "admin" in key.scopes):
        raise JobNotFoundError(number)
    return as_seen(record, time.time())


def _started(record: JobRecord) -> JobRecord:
    if record.is_finished:  # cancelled while it was queued
        return record
    now = time.time()
    return replace(record, state="running", started_at=now, heartbeat=now)


def _beaten(record: JobRecord, share: float) -> JobRecord:
    if record.is_finished:
        return record
    return replace(record, progress=round(share, 4), heartbeat=time.time())


def _cancelled(record: JobRecord) -> JobRecord:
    seen = as_seen(record, time.time())
    if seen.is_finished:
        return seen
    state: State = "cancelled" if seen.state == "queued" else seen.state
    return replace(seen, state=state, is_cancelled=True)
