import asyncio
import math
import threading
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.errors import BusyError
from bonsai_lora.service import work
from bonsai_lora.service.apply import cost_of_body
from bonsai_lora.service.work import (
    ITERATION_NANOSECONDS,
    LOOP_NANOSECONDS,
    LOOP_NANOSECONDS_WITH_SPARE_CORES,
    Lane,
    ShortLane,
)
from bonsai_lora.wire.media import Form


def order_of(nanoseconds):
    """Three pieces of work that become ready together, and the event loop's other callbacks."""
    seen = []

    async def look():
        for _ in range(10):
            seen.append("look")
            await asyncio.sleep(0)

    async def main():
        lane = ShortLane(4, 1, has_spare_cores=False)
        works = [lane.run_estimated(lambda: seen.append("work"), nanoseconds) for _ in range(3)]
        await asyncio.gather(*works, look())

    asyncio.run(main())
    return seen


def test_short_work_runs_immediately():
    assert order_of(ITERATION_NANOSECONDS / 3)[:3] == ["work"] * 3
    assert order_of(1)[:3] == ["work"] * 3


def test_an_iteration_has_little_work():
    """Two pieces fill one; the third runs in the next, after other callbacks."""
    seen = order_of(ITERATION_NANOSECONDS / 2)
    assert seen[:3] == ["work", "work", "look"]
    assert seen.count("work") == 3


@pytest.mark.parametrize("nanoseconds", [ITERATION_NANOSECONDS, 3 * ITERATION_NANOSECONDS])
def test_longer_work_takes_turns(nanoseconds):
    seen = order_of(nanoseconds)
    assert seen.count("work") == 3
    places = [place for place, what in enumerate(seen) if what == "work"]
    assert all(after - before > 1 for before, after in pairwise(places))


@pytest.mark.parametrize(
    ("has_spare_cores", "most"),
    [(False, LOOP_NANOSECONDS), (True, LOOP_NANOSECONDS_WITH_SPARE_CORES)],
)
def test_the_longest_work_runs_in_a_thread(has_spare_cores, most):
    async def main(nanoseconds):
        lane = ShortLane(1, 1, has_spare_cores=has_spare_cores)
        return await lane.run_estimated(threading.get_ident, nanoseconds)

    assert asyncio.run(main(most)) == threading.get_ident()
    assert asyncio.run(main(most + 1)) != threading.get_ident()


def test_a_cancelled_turn_does_not_block_the_next():
    async def main():
        lane = ShortLane(2, 1, has_spare_cores=False)
        first = asyncio.create_task(lane.run_estimated(lambda: 1, 2 * ITERATION_NANOSECONDS))
        second = asyncio.create_task(lane.run_estimated(lambda: 2, 2 * ITERATION_NANOSECONDS))
        await asyncio.sleep(0)
        first.cancel()
        assert await asyncio.wait_for(second, 5) == 2

    asyncio.run(main())


def test_admissions_are_limited_and_released():
    lane = ShortLane(1, 1, has_spare_cores=False)
    with lane.admit():
        assert lane.in_progress == 1
        with pytest.raises(BusyError), lane.admit():
            pass
    assert lane.in_progress == 0


def test_many_refusals_say_later_and_different_times_to_retry(monkeypatch):
    now = 100.0
    monkeypatch.setattr(work, "monotonic", lambda: now)
    lane = Lane("long", 4, 1)
    for number in range(4):
        lane.enter(number)

    def refuse():
        with pytest.raises(BusyError) as caught:
            lane.check()
        return caught.value.values["retry_seconds"]

    assert [refuse() for _ in range(7)] == [1] * 7
    many = [refuse() for _ in range(1000)]
    assert max(many[:100]) < 30
    assert {*many[500:]} == {*range(15, 30)}
    now = 101.0
    assert refuse() >= 15
    now = 102.0
    assert refuse() == 1


def test_a_request_is_sure_of_its_place_for_some_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(work, "monotonic", lambda: now)
    lane = ShortLane(2, 1, has_spare_cores=False)
    names = [f"request {number}" for number in range(12)]
    for name in names[:2]:
        lane.enter(name)
    now = 9.0
    with pytest.raises(BusyError):
        lane.check()
    assert lane.crowded_at < 0
    for name in names[2:10]:  # each has the place of the oldest
        now += 10.0
        lane.enter(name)
    assert lane.in_progress == 10
    now += 10.0
    with pytest.raises(BusyError):  # eight go on without a place, which is the limit
        lane.enter(names[10])
    assert lane.crowded_at == now
    lane.leave(names[0])
    lane.enter(names[10])
    for name in names[1:11]:
        lane.leave(name)
    assert lane.in_progress == 0


def test_long_json_does_not_hold_the_event_loop():
    matrices = np.ones((2, 4096), np.float32), np.ones((1, 2), np.float32)
    adapter = LoraAdapter(LoraConfig(rank=2), *matrices, 1.0)
    adapter.apply(np.ones(4096, np.float32))  # nothing is to be read any more
    most = 1 << 21
    assert cost_of_body(adapter, most, Form.JSON, Form.JSON) < LOOP_NANOSECONDS
    assert cost_of_body(adapter, most + 1, Form.JSON, Form.JSON) == math.inf
    assert cost_of_body(adapter, most + 1, Form.BINARY, Form.BINARY) < LOOP_NANOSECONDS


def test_pieces_run_some_at_a_time_and_leave_room_in_between():
    async def run():
        lane = Lane("long", 4, 1)
        order = []
        works = [partial(order.append, number) for number in range(6)]
        pieces = asyncio.ensure_future(lane.run_each(works, 1))
        await asyncio.sleep(0)
        await lane.run(order.append, "other")
        await pieces
        return order, lane.waiting

    order, waiting = asyncio.run(run())
    assert [one for one in order if one != "other"] == list(range(6))
    assert order.index("other") <= 2
    assert waiting == 0


def test_results_keep_their_order():
    works = [partial(lambda number: number * number, number) for number in range(20)]
    assert asyncio.run(Lane("long", 4, 2).run_each(works, 2)) == [n * n for n in range(20)]
    assert asyncio.run(Lane("long", 4, 2).run_each([], 2)) == []


def test_after_an_error_nothing_more_is_started():
    begun = []

    def work(number):
        begun.append(number)
        if number == 3:
            raise ValueError("three")

    lane = Lane("long", 4, 2)
    with pytest.raises(ValueError, match="three"):
        asyncio.run(lane.run_each([partial(work, number) for number in range(100)], 2))
    assert len(begun) < 10
    assert lane.waiting == 0
