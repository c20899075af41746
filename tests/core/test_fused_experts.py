"""A and B of all experts of a layer: expert e has rows e * r … of A and columns e, E + e, … of B."""

import numpy as np
import pytest
import reference

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.batch import apply_segments, expert_segments, rows_of
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.spectrum import delta_norm, effective_rank, singular_values

EXPERTS, RANK, D_IN, D_OUT = 3, 2, 5, 4


@pytest.fixture
def adapter(rng):
    a_matrix = rng.standard_normal((EXPERTS * RANK, D_IN)).astype(np.float32)
    b_matrix = rng.standard_normal((D_OUT, RANK * EXPERTS)).astype(np.float32)
    return LoraAdapter(LoraConfig(rank=RANK, alpha=-3.0), a_matrix, b_matrix, -1.5, experts=EXPERTS)


def delta_of(adapter, expert):
    rows = slice(expert * RANK, (expert + 1) * RANK)
    b_matrix = adapter.b_matrix[:, expert::EXPERTS]
    return reference.delta_weight(adapter.a_matrix[rows], b_matrix, adapter.scaling)


def test_size_and_shape_are_those_of_the_block_diagonal_matrix(adapter):
    deltas = [delta_of(adapter, expert) for expert in range(EXPERTS)]
    values = np.concatenate([np.linalg.svd(one, compute_uv=False)[:RANK] for one in deltas])
    expected = np.sort(values)[::-1]
    assert singular_values(adapter) == pytest.approx(expected, rel=1e-9)
    assert delta_norm(adapter) == pytest.approx(np.linalg.norm(deltas), rel=1e-10)
    shares = expected / expected.sum()
    assert effective_rank(adapter) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_the_norm_keeps_its_digits_where_the_rows_of_each_expert_nearly_cancel():
    """B takes the difference, 1e-7, of two equally long rows of A, in both experts."""
    a_matrix = np.array([[1, 0], [1, 1e-7], [0, 1], [1e-7, 1]], np.float32)
    b_matrix = np.array([[1, 1, -1, -1]], np.float32)
    adapter = LoraAdapter(LoraConfig(rank=2, alpha=2.0), a_matrix, b_matrix, 1.0, experts=2)
    assert delta_norm(adapter) == pytest.approx(2**0.5 * 1e-7, rel=1e-6)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 2, 3], [0, 2, 4]])
@pytest.mark.parametrize("weights", [2.0, [1.0, 0.5, -2.0, 3.0, 0.0]])
def test_each_row_goes_through_its_expert(rng, adapter, rows, weights):
    x = rng.standard_normal((5, D_IN)).astype(np.float32)
    experts = np.array([2, 0, 2, 1, 0])
    own = weights if isinstance(weights, float) else np.array(weights, np.float32)[rows]
    segments = expert_segments(adapter, rows_of(rows), own, experts)
    got = apply_segments(x, segments, D_OUT)
    expected = np.zeros((5, D_OUT))
    for row, weight in zip(rows, np.broadcast_to(own, len(rows)), strict=True):
        expected[row] = weight * (delta_of(adapter, experts[row]) @ x[row])
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    # One read of each expert in use, however many rows it has.
    assert len(segments) == len(set(experts[rows]))


def test_parameters_are_counted_for_every_expert(adapter):
    assert adapter.param_count() == EXPERTS * RANK * (D_IN + D_OUT)
    assert adapter.memory_bytes() == 4 * adapter.param_count()
