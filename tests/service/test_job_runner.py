"""The runner of jobs, without HTTP: progress, heartbeats, cancelling, stores that are away."""

import asyncio
import errno
import time

import pytest

from bonsai_lora.errors import (
    JobCancelledError,
    MemoryBudgetError,
    StoreFullError,
    StoreUnreachableError,
)
from bonsai_lora.service import jobs
from bonsai_lora.service.budget import Budget
from bonsai_lora.service.jobs import Jobs, Progress
from bonsai_lora.service.keys import ANYONE
from bonsai_lora.service.work import Lane
from bonsai_lora.storage.jobs import JobFolder


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch):
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 0.01)


class Folder(JobFolder):
    """Records that cannot be changed for a while."""

    error = None
    asked = 0

    def add(self, record):
        self._fail()
        super().add(record)

    def update(self, number, change):
        self._fail()
        return super().update(number, change)

    def _fail(self):
        self.asked += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "jobs")


def runner_of(folder):
    return Jobs(folder, Lane("jobs", 3, 1), Budget(100))


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def end_of(runner, number):
    """The job when it has ended and left its place."""
    await until(lambda: not runner._tasks)
    return await runner.get(ANYONE, number)


def test_a_job_that_runs_shows_how_far_it_is_and_that_it_lives(folder):
    async def run():
        runner, go_on = runner_of(folder), asyncio.Event()

        async def work(progress):
            progress.share = 0.123456
            await go_on.wait()
            return {"rank": 1}

        number = (await runner.submit(ANYONE, "combine", 1, work)).id
        started = time.time()
        await until(lambda: folder.read(number).progress > 0)
        seen = folder.read(number)
        await until(lambda: folder.read(number).heartbeat > seen.heartbeat)
        go_on.set()
        ended = await end_of(runner, number)
        assert (seen.state, seen.progress, seen.error) == ("running", 0.1235, None)
        assert started - 1 < seen.started_at <= seen.heartbeat <= time.time()
        assert (ended.state, ended.progress) == ("done", 1.0)
        assert await runner.result(ended) == {"rank": 1}
        assert await runner.result(seen) is None

    asyncio.run(run())


def test_a_job_of_this_process_is_cancelled_without_waiting_for_a_beat(folder, monkeypatch):
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 60.0)

    async def run():
        runner, pieces = runner_of(folder), []
        started, go_on = asyncio.Event(), asyncio.Event()

        async def work(progress):
            for one in progress.follow([lambda: pieces.append(1)] * 3, [1, 1, 1]):
                one()
                started.set()
                await go_on.wait()

        number = (await runner.submit(ANYONE, "combine", 1, work)).id
        await started.wait()
        seen = await runner.cancel(ANYONE, number)
        go_on.set()
        assert (seen.state, seen.is_cancelled) == ("running", True)
        assert (await end_of(runner, number)).state == "cancelled"
        assert len(pieces) == 1

    asyncio.run(run())


def test_pieces_count_by_their_sizes_and_stop_when_they_should():
    progress, shares = Progress(), []
    for one in progress.follow([lambda: "x"] * 3, [5, 0, 15]):
        assert one() == "x"
        shares.append(progress.share)
    assert shares == [0.25, 0.25, 1.0]
    for one in progress.follow([lambda: None], [0]):
        one()
    assert progress.share == 1.0
    progress.is_cancelled = True
    (never,) = progress.follow([pytest.fail], [1])
    with pytest.raises(JobCancelledError):
        never()


@pytest.mark.parametrize("is_back", [True, False])
def test_the_end_of_a_job_is_written_when_the_store_is_back(folder, monkeypatch, is_back):
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 30.0 if is_back else 0.1)

    async def run():
        runner, go_on = runner_of(folder), asyncio.Event()

        async def work(_):
            await go_on.wait()
            return {}

        number = (await runner.submit(ANYONE, "combine", 1, work)).id
        await until(lambda: folder.read(number).state == "running")
        folder.error = StoreUnreachableError("away")
        go_on.set()
        asked = folder.asked
        await until(lambda: folder.asked >= asked + (3 if is_back else 1))
        assert folder.read(number).state == "running"
        if is_back:
            folder.error = None
        assert (await end_of(runner, number)).state == ("done" if is_back else "running")
        assert runner.lane.in_progress == 0

    asyncio.run(run())


@pytest.mark.parametrize("error", [StoreUnreachableError("away"), OSError(errno.EIO, "broken")])
def test_a_beat_that_cannot_be_written_is_not_the_last(folder, error):
    async def run():
        runner = runner_of(folder)

        async def work(progress):
            folder.error = error
            asked = folder.asked
            await until(lambda: folder.asked >= asked + 3)
            folder.error = None
            progress.share = 0.5
            await until(lambda: folder.read(folder.ids()[0]).progress == 0.5)
            return {}

        number = (await runner.submit(ANYONE, "combine", 1, work)).id
        assert (await end_of(runner, number)).state == "done"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("needed", "error"), [(101, MemoryBudgetError), (100, StoreFullError), (100, None)]
)
def test_a_job_that_is_not_accepted_holds_nothing(folder, needed, error):
    async def run():
        runner = runner_of(folder)
        folder.error = StoreFullError("full") if error is StoreFullError else None

        async def work(_):
            return {}

        if error is None:
            number = (await runner.submit(ANYONE, "combine", needed, work)).id
            assert (await end_of(runner, number)).state == "done"
        else:
            with pytest.raises(error):
                await runner.submit(ANYONE, "combine", needed, work)
            assert folder.ids() == []
        assert runner.lane.in_progress == 0
        assert runner._memory.reserved_bytes == 0

    asyncio.run(run())


def test_a_page_has_the_jobs_that_are_older_than_the_cursor(folder):
    async def run():
        runner = runner_of(folder)

        async def work(_):
            return {}

        numbers = []
        for _ in range(3):
            numbers.append((await runner.submit(ANYONE, "combine", 1, work)).id)
            await end_of(runner, numbers[-1])
            await asyncio.sleep(0.002)  # ids sort by the millisecond
        numbers.reverse()

        async def page(limit, cursor):
            return [one.id for one in await runner.page(ANYONE, limit, cursor)]

        assert await page(2, None) == numbers[:2]
        assert await page(2, numbers[0]) == numbers[1:]
        assert await page(9, numbers[1]) == numbers[2:]
        assert await page(9, numbers[2]) == []

    asyncio.run(run())
