import numpy as np
import reference
from hypothesis import given
from hypothesis import strategies as st

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.batch import Segment, apply_segments, rows_of
from bonsai_lora.core.config import LoraConfig

D_IN, D_OUT = 24, 17
QUARTERS = st.integers(-8, 8).map(lambda n: n / 4)


def adapter_of(rank, seed):
    rng = np.random.default_rng(seed)
    config = LoraConfig(rank=rank, alpha=2.0)
    a_matrix = rng.standard_normal((rank, D_IN)).astype(np.float32)
    b_matrix = rng.standard_normal((D_OUT, rank)).astype(np.float32)
    return LoraAdapter(config, a_matrix, b_matrix, config.scaling)


ADAPTERS = [adapter_of(rank, seed) for seed, rank in enumerate([0, 1, 3, 8, 40])]


@given(
    st.lists(
        st.dictionaries(st.integers(0, len(ADAPTERS) - 1), QUARTERS, max_size=3),
        min_size=1,
        max_size=20,
    )
)
def test_a_mixed_batch_is_its_rows_one_by_one(stacks):
    x = np.random.default_rng(len(stacks)).standard_normal((len(stacks), D_IN)).astype(np.float32)
    segments = []
    for number, adapter in enumerate(ADAPTERS):
        rows = [row for row, stack in enumerate(stacks) if number in stack]
        if rows:
            weights = np.array([stacks[row][number] for row in rows], np.float32)
            segments.append(Segment(adapter, rows_of(rows), weights))
    got = apply_segments(x, segments, D_OUT)
    for row, stack in enumerate(stacks):
        parts = [
            weight * reference.apply(one.a_matrix, one.b_matrix, one.scaling, x[row])
            for one, weight in ((ADAPTERS[number], weight) for number, weight in stack.items())
        ]
        expected = sum(parts, np.zeros(D_OUT))
        # Sums of d_in, then of r products, each rounded once per step (Higham 2002, section 3.1).
        bound = sum(
            abs(weight * one.scaling)
            * (np.abs(one.b_matrix) @ (np.abs(one.a_matrix) @ abs(x[row])))
            for one, weight in ((ADAPTERS[number], weight) for number, weight in stack.items())
        )
        assert (np.abs(got[row] - expected) <= (D_IN + 45) * 2.0**-24 * bound).all()
        if not stack:
            assert not got[row].any()


def test_rows_that_follow_each_other_are_a_slice():
    assert rows_of([3, 4, 5]) == slice(3, 6)
    assert rows_of([7]) == slice(7, 8)
    assert rows_of([0, 2]).tolist() == [0, 2]
