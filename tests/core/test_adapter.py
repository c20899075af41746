import dataclasses
import time

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.core import merge
from bonsai_lora.core.adapter import LoraAdapter, find_transposed
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.errors import ShapeMismatchError

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def random_adapter(rng, d_in, d_out, rank, alpha=6.0, dtype=np.float32):
    own = LoraConfig(rank=rank, alpha=alpha, target_modules=())
    a_matrix = rng.standard_normal((rank, d_in)).astype(dtype)
    b_matrix = rng.standard_normal((d_out, rank)).astype(dtype)
    return LoraAdapter(own, a_matrix, b_matrix, own.scaling)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 8),
    st.integers(0, 9),
    st.sampled_from(DTYPES),
)
@settings(max_examples=80)
def test_apply_agrees_with_float64(d_in, d_out, rank, rows, dtype):
    rng = np.random.default_rng([d_in, d_out, rank, rows])
    adapter = random_adapter(rng, d_in, d_out, rank, dtype=dtype)
    x = rng.standard_normal((rows, d_in)).astype(np.float32)
    expected = reference.apply(adapter.a_matrix, adapter.b_matrix, adapter.scaling, x)
    got = adapter.apply(x)
    assert got.dtype == np.float32
    assert got.shape == (rows, d_out)
    assert reference.relative_error(got, expected) < 1e-5
    for row in range(rows):
        assert reference.relative_error(adapter.apply(x[row]), expected[row]) < 1e-4


def test_apply_at_the_size_of_a_model(rng):
    adapter = random_adapter(rng, 4096, 4096, 16)
    x = rng.standard_normal((32, 4096)).astype(np.float32)
    expected = reference.apply(adapter.a_matrix, adapter.b_matrix, adapter.scaling, x)
    assert reference.relative_error(adapter.apply(x), expected) < 1e-6


@pytest.mark.parametrize("shape", [(7,), (9,), (2, 7), (), (1, 1, 8)])
def test_a_wrong_width_is_refused_not_truncated(shape):
    with pytest.raises(ShapeMismatchError) as caught:
        LoraAdapter.new(8, 4, LoraConfig()).apply(np.zeros(shape, np.float32))
    assert caught.value.values["got"] == list(shape)
    assert str(caught.value) == f"the input has shape {list(shape)}; expected [8] or [rows, 8]"


@pytest.mark.parametrize(
    "shapes",
    [
        ((64, 4), (3, 1)),  # the kernel would read 63 numbers after each row of B
        ((2, 4), (2, 3)),
        ((2, 4), (3,)),
        ((2,), (3, 2)),
        ((2, 4), (3, 2, 2)),
        ((2, 4), (3, 2), (1,)),
        ((2, 4), (3, 2), (4,)),
        ((2, 4), (3, 2), None, (2,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    a_matrix, b_matrix, *vectors = (
        one if one is None else np.ones(one, np.float32) for one in shapes
    )
    with pytest.raises(ShapeMismatchError, match="expected"):
        LoraAdapter(LoraConfig(), a_matrix, b_matrix, 1.0, *vectors)


def test_rank_zero_changes_nothing():
    adapter = LoraAdapter.new(5, 3, LoraConfig(rank=0))
    assert (adapter.d_in, adapter.d_out, adapter.scaling) == (5, 3, 0.0)
    assert adapter.param_count() == 0
    assert not adapter.apply(np.ones((2, 5), np.float32)).any()
    weights = np.ones((3, 5), np.float32)
    adapter.merge_into_weights(weights)
    assert (weights == 1).all()


def test_width_zero():
    adapter = LoraAdapter.new(0, 3, LoraConfig(rank=2))
    assert adapter.a_matrix.shape == (2, 0)
    assert not adapter.apply(np.ones((4, 0), np.float32)).any()


def test_scaling_is_a_float32_quotient():
    assert LoraAdapter.new(2, 2, LoraConfig(rank=3, alpha=8.0)).scaling == float(
        np.float32(8) / np.float32(3)
    )


def test_adapter_is_immutable():
    adapter = LoraAdapter.new(8, 4, LoraConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.scaling = 2.0
    with pytest.raises(ValueError, match="read-only"):
        adapter.b_matrix[0, 0] = 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"), [(1, 1, 1), (7, 5, 2), (300, 1000, 8), (3, 300_000, 2), (4, 4, 0)]
)
def test_merge_is_the_float32_sum_rounded_once(rng, dtype, d_out, d_in, rank):
    adapter = random_adapter(rng, d_in, d_out, rank)
    weights = rng.standard_normal((d_out, d_in)).astype(dtype)
    exact = reference.merge(weights, adapter.a_matrix, adapter.b_matrix, adapter.scaling)
    merged = weights.copy()
    adapter.merge_into_weights(merged)
    assert merged.dtype == dtype
    # Half a unit in the last place of the dtype, plus what float32 sums of rank + 1 terms lose.
    half_ulp = np.abs(exact) * (float(ml_dtypes.finfo(dtype).eps) / 2)
    terms = np.abs(adapter.scaling) * (np.abs(adapter.b_matrix) @ np.abs(adapter.a_matrix))
    slack = (rank + 2) * 2.0**-23 * (terms + np.abs(weights.astype(np.float64)))
    assert (np.abs(merged.astype(np.float64) - exact) <= half_ulp + slack).all()


def test_merge_rounds_to_nearest_even():
    # 1 + 2^-9 lies halfway between two bfloat16 numbers, of which 1.0 is even.
    adapter = LoraAdapter(
        LoraConfig(rank=1, alpha=1.0),
        np.array([[2.0**-8, 3 * 2.0**-8]], np.float32),
        np.ones((1, 1), np.float32),
        1.0,
    )
    weights = np.ones((1, 2), ml_dtypes.bfloat16)
    adapter.merge_into_weights(weights)
    assert weights.astype(np.float64).tolist() == [[1.0, 1.0 + 2.0**-6]]


def test_blocks_cover_every_element_once():
    for d_out, d_in in [(1, 1), (1000, 300), (2, merge.BLOCK_VALUES + 5), (0, 4), (4, 0)]:
        seen = np.zeros((d_out, d_in), int)
        for rows, columns in merge.blocks(d_out, d_in):
            seen[rows, columns] += 1
            assert seen[rows, columns].size <= merge.BLOCK_VALUES
        assert (seen == 1).all()


@pytest.mark.parametrize(
    ("whole_rows", "expected"),
    [
        (False, [(0, 0, 4), (0, 4, 8), (0, 8, 9), (1, 0, 4), (1, 4, 8), (1, 8, 9)]),
        (True, [(0, 0, 9), (1, 0, 9)]),
    ],
)
def test_rows_longer_than_a_block_are_cut_unless_they_are_wanted_whole(whole_rows, expected):
    found = merge.blocks(2, 9, most=4, whole_rows=whole_rows)
    assert [(rows.start, columns.start, columns.stop) for rows, columns in found] == expected


def test_short_rows_share_a_block():
    found = [(rows.start, rows.stop) for rows, _ in merge.blocks(5, 4, most=8)]
    assert found == [(0, 2), (2, 4), (4, 5)]


def test_merge_of_a_different_shape_is_refused():
    with pytest.raises(ShapeMismatchError):
        LoraAdapter.new(8, 4, LoraConfig()).merge_into_weights(np.zeros((8, 4), np.float32))


def test_factors_that_are_transposed_find_each_other(rng):
    one, two, other = (random_adapter(rng, 9, 6, 2, dtype=ml_dtypes.bfloat16) for _ in range(3))
    flat = random_adapter(rng, 6, 9, 2, dtype=ml_dtypes.bfloat16)
    embeddings = {"one": (one.a_matrix, one.b_matrix), "two": (two.a_matrix, two.b_matrix)}
    factors = {
        "head": (two.b_matrix.T.copy(), two.a_matrix.T.copy()),
        "not transposed": (one.a_matrix, one.b_matrix),
        "half": (two.b_matrix.T, other.a_matrix.T),
        "same shape": (flat.a_matrix, flat.b_matrix),
        "no matrix": (np.zeros(3, np.float32), np.zeros((), np.float32)),
    }
    assert find_transposed(factors, embeddings) == {"head": "two"}
    assert find_transposed(factors, {}) == find_transposed({}, embeddings) == {}


def test_many_factors_of_one_shape_are_compared_in_linear_time():
    """Each with each would be 400 million comparisons."""
    same = np.zeros((2, 2), np.float32)
    embeddings = {f"e{number}": (same + number, same) for number in range(20_000)}
    heads = {f"h{number}": (same, same - number - 1) for number in range(20_000)}
    before = time.process_time()
    assert find_transposed(heads, embeddings) == {}
    assert time.process_time() - before < 20
