"""Threads that share out an apply give what one gives, asleep or awake, and never get stuck."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest

from bonsai_lora.core import crew, products
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.crew import Crew

SHAPES = [(4096, 512, 8), (1030, 2100, 17), (2048, 300, 64), (1, 1, 1), (7, 5, 0), (64, 64, 3)]
ROWS = [1, 2, 13, 24, 60]


@pytest.fixture(params=[2, 3, 5])
def shared(request, monkeypatch):
    """A crew of more threads than there may be cores, which shares out everything."""
    made = Crew(request.param)
    monkeypatch.setattr(products, "_SHARED_OPERATIONS", -1)
    monkeypatch.setattr(crew, "_crew", made)
    return made


def adapter(d_in, d_out, rank):
    rng = np.random.default_rng(rank)
    a_matrix = rng.standard_normal((rank, d_in)).astype(np.float32)
    b_matrix = rng.standard_normal((d_out, rank)).astype(np.float32)
    return LoraAdapter(LoraConfig(rank=rank), a_matrix, b_matrix, 1.5)


def vectors(rows, width):
    return np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)


def alone(one, x):
    """What one thread gives."""
    kept, crew._crew = crew._crew, Crew(1)
    try:
        return one.apply(x)
    finally:
        crew._crew = kept


def test_all_threads_take_part(shared):
    adapter(64, 64, 16).apply(vectors(4, 64))
    assert len(shared._wakes) == shared.threads - 1
    tickets = np.ndarray(1, np.int64, shared._room.data, shared._shared - shared._room.ctypes.data)
    assert tickets[0] == 1


def test_small_applies_are_not_shared_out(monkeypatch):
    made = Crew(2)
    monkeypatch.setattr(crew, "_crew", made)
    adapter(64, 64, 16).apply(vectors(4, 64))
    assert not made._wakes
    adapter(4096, 4096, 16).apply(vectors(32, 4096))
    assert len(made._wakes) == 1


def test_without_room_for_threads_it_works_alone(shared, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    one, x = adapter(64, 64, 16), vectors(4, 64)
    expected = alone(one, x)
    for _ in range(3):
        assert np.array_equal(one.apply(x), expected)
    assert shared.threads == 1


def test_an_interrupt_while_threads_are_woken_leaves_nobody_waiting(shared, monkeypatch):
    monkeypatch.setattr(crew, "_PATIENCE", 0)
    one, x = adapter(64, 64, 16), vectors(4, 64)
    expected = one.apply(x)
    time.sleep(0.05)  # they sleep
    wake = shared._wake

    def interrupted(sleepers):
        wake(sleepers)
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "_wake", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.apply(x)
    monkeypatch.setattr(shared, "_wake", wake)
    assert np.array_equal(one.apply(x), expected)


@pytest.mark.parametrize("threads", [0, -1, 17])
def test_wrong_numbers_of_threads(threads):
    with pytest.raises(ValueError, match="expected 1 to 16 threads"):
        Crew(threads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_to_the_bit(shared, shape):
    one = adapter(*shape)
    for rows in ROWS:
        x = vectors(rows, shape[0])
        expected = alone(one, x)
        for _ in range(20):
            assert np.array_equal(one.apply(x), expected), rows
    assert not one.apply_checked(np.full((3, shape[0]), np.nan, np.float32))[1] or shape[2] == 0


@pytest.mark.parametrize("patience", [0, 50, 300])
def test_threads_sleep_and_are_woken(shared, monkeypatch, patience):
    """With little patience each job finds some awake, some asleep, and some falling so."""
    monkeypatch.setattr(crew, "_PATIENCE", patience)
    one, x = adapter(64, 64, 16), vectors(4, 64)
    expected = alone(one, x)
    for number in range(3000):
        assert np.array_equal(one.apply(x), expected)
        if number % 300 == 0:
            time.sleep(0.002)


def test_many_callers(shared):
    """One has the crew, the others do without."""
    one = adapter(2048, 300, 64)
    batches = [vectors(rows, 2048) for rows in ROWS]
    expected = [alone(one, x) for x in batches]
    wrong = []

    def call():
        for _ in range(40):
            for x, right in zip(batches, expected, strict=True):
                if not np.array_equal(one.apply(x), right):
                    wrong.append(len(x))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_its_parents_threads(shared):
    one, x = adapter(2048, 300, 64), vectors(13, 2048)
    expected = one.apply(x)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(one.apply(x)))
    child.start()
    assert np.array_equal(answers.get(timeout=30), expected)
    child.join(30)
    assert child.exitcode == 0


def test_setting_the_same_number_keeps_the_threads(monkeypatch):
    monkeypatch.setattr(crew, "_crew", Crew(1))
    crew.set_threads(2)
    first = crew.crew()
    crew.set_threads(2)
    assert crew.crew() is first
    crew.set_threads(1)
    assert crew.crew().threads == 1
