import gc
import threading

import ml_dtypes
import numpy as np
import pytest
import reference

from app.core import adapter as module
from app.core.adapter import LoraAdapter
from app.core.config import LoraConfig
from app.core.layout import Room

D_IN, D_OUT, RANK = 48, 32, 4
SIZE = 4 * RANK * (D_IN + D_OUT)


def adapter(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    a_matrix = rng.standard_normal((RANK, D_IN)).astype(dtype)
    b_matrix = rng.standard_normal((D_OUT, RANK)).astype(dtype)
    return LoraAdapter(LoraConfig(rank=RANK), a_matrix, b_matrix, 2.0)


@pytest.fixture
def room(monkeypatch):
    """Room for two adapters."""
    made = Room(2 * SIZE)
    monkeypatch.setattr(module, "ROOM", made)
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", range(1, 10))
def test_every_layout_and_number_of_rows_gives_the_same(room, dtype, rows):
    x = np.random.default_rng(rows).standard_normal((rows, D_IN)).astype(np.float32)
    one = adapter(dtype)
    a_matrix, b_matrix = one.a_matrix.astype(np.float64), one.b_matrix.astype(np.float64)
    expected = reference.apply(a_matrix, b_matrix, 2.0, x)
    assert reference.relative_error(one.apply(x), expected) < 1e-6
    room.max_bytes = 0
    beyond = adapter(dtype)
    assert reference.relative_error(beyond.apply(x), expected) < 1e-6
    assert (one.copied_bytes(), beyond.copied_bytes()) == (SIZE, 0)


def test_what_lies_beyond_the_room_is_ready_where_it_needs_no_cast(room):
    made = [adapter(seed=seed) for seed in range(3)]
    made += [adapter(np.float16, seed=seed) for seed in range(2)]
    assert not any(one.is_ready for one in made)
    for one in made:
        assert one.factors[0].dtype == np.float32
    assert [one.is_ready for one in made] == [True, True, True, False, False]
    assert [one.copied_bytes() for one in made] == [SIZE, SIZE, 0, 0, 0]
    assert made[2].factors[0] is made[2].a_matrix


def test_room_comes_back_with_its_owner(room):
    first, second = adapter(seed=1), adapter(seed=2)
    assert first.factors[0].flags.f_contiguous
    assert second.factors[0].flags.f_contiguous
    assert room.taken_bytes == 2 * SIZE
    del first
    gc.collect()
    assert room.taken_bytes == SIZE


def test_threads_take_room_once(room):
    for seed in range(20):
        one = adapter(seed=seed)
        barrier = threading.Barrier(8)

        def ask(one=one, barrier=barrier):
            barrier.wait()
            assert one.factors

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert room.taken_bytes == SIZE
        del one, threads, ask
        gc.collect()


def test_merges_take_no_room(room):
    one = adapter()
    weights = np.zeros((D_OUT, D_IN), np.float32)
    one.merge_into_weights(weights)
    assert weights.any()
    assert room.taken_bytes == 0
