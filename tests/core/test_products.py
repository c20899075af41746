"""The products agree with float64, in NumPy and on every kind of registers, whatever the batch."""

import ml_dtypes
import numpy as np
import pytest
import reference

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.backend import merge
from bonsai_lora.core.config import LoraConfig

DTYPES = [np.dtype(one) for one in (np.float32, np.float16, ml_dtypes.bfloat16)]
# d_in, d_out, rank: with and without rests of vectors, of squares, of stretches.
SHAPES = [
    (48, 32, 4),
    (64, 200, 12),
    (4096, 512, 8),
    (1030, 2100, 17),
    (2048, 300, 64),
    (1, 1, 1),
    (7, 5, 0),
]
ROWS = [1, 2, 3, 4, 5, 6, 7, 13, 32]


def matrices(d_in, d_out, rank, dtype=np.float32):
    rng = np.random.default_rng(rank)
    a_matrix = rng.standard_normal((rank, d_in)).astype(dtype)
    return a_matrix, rng.standard_normal((d_out, rank)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply_agrees_with_float64(computing, shape, dtype):
    a_matrix, b_matrix = matrices(*shape, dtype)
    one = LoraAdapter(LoraConfig(rank=shape[2]), a_matrix, b_matrix, 1.5)
    x = np.random.default_rng(1).standard_normal((max(ROWS), shape[0])).astype(np.float32)
    doubles = a_matrix.astype(np.float64), b_matrix.astype(np.float64)
    expected = reference.apply(*doubles, 1.5, x)
    for rows in ROWS:
        got = one.apply(x[:rows])
        assert got.flags.c_contiguous
        assert got.shape == expected[:rows].shape
        assert reference.relative_error(got, expected[:rows]) < 2e-6, rows
    vector = one.apply(x[0])
    assert vector.shape == (shape[1],)
    assert np.array_equal(vector, got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(computing, shape, dtype):
    one = LoraAdapter(LoraConfig(rank=shape[2]), *matrices(*shape, dtype), 1.5)
    x = np.random.default_rng(2).standard_normal((max(ROWS), shape[0])).astype(np.float32)
    together = one.apply(x)
    for rows in ROWS:
        for first in {0, max(ROWS) - rows}:
            alone = one.apply(x[first : first + rows])
            assert np.array_equal(alone, together[first : first + rows]), (rows, first)
    weights = np.linspace(-2, 2, max(ROWS)).astype(np.float32)
    weighted = one.apply(x, weights)
    for row, weight in enumerate(weights):
        assert np.array_equal(one.apply(x[row], float(weight)), weighted[row])


def test_rows_that_lie_apart_or_unaligned(computing):
    one = LoraAdapter(LoraConfig(rank=8), *matrices(100, 70, 8), 2.0)
    wide = np.random.default_rng(3).standard_normal((9, 300)).astype(np.float32)
    expected = one.apply(np.ascontiguousarray(wide[::2, 50:150]))
    assert np.array_equal(one.apply(wide[::2, 50:150]), expected)
    turned = np.asfortranarray(wide[::2, 50:150])
    assert np.array_equal(one.apply(turned), expected)
    raw = np.zeros(expected.size * 4 + 5 * 100 * 4, np.uint8)
    unaligned = np.ndarray((5, 100), np.float32, raw.data, 3)
    unaligned[:] = turned
    assert np.array_equal(one.apply(unaligned), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_that_lie_otherwise(computing, dtype):
    a_matrix, b_matrix = matrices(300, 200, 12, dtype)
    x = np.random.default_rng(4).standard_normal((5, 300)).astype(np.float32)
    expected = LoraAdapter(LoraConfig(rank=12), a_matrix, b_matrix, 2.0).apply(x)
    raw = np.zeros(a_matrix.nbytes + 1, np.uint8)
    unaligned = np.ndarray(a_matrix.shape, dtype, raw.data, 1)
    unaligned[:] = a_matrix
    for a_other, b_other in (
        (np.asfortranarray(a_matrix), np.asfortranarray(b_matrix)),
        (unaligned, b_matrix),
        (np.repeat(a_matrix, 2, axis=0)[::2], np.repeat(b_matrix, 2, axis=1)[:, ::2]),
    ):
        one = LoraAdapter(LoraConfig(rank=12), a_other, b_other, 2.0)
        assert np.array_equal(one.apply(x), expected)
    of_two_kinds = LoraAdapter(LoraConfig(rank=12), a_matrix, b_matrix.astype(np.float32), 2.0)
    assert reference.relative_error(of_two_kinds.apply(x), expected) < 1e-6


def rounded(array, dtype):
    with np.errstate(over="ignore"):
        return array.astype(dtype)


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merges_round_once(computing, dtype, base_dtype):
    """Base + factor * product, where the product and each step are float32."""
    for rows, columns, rank in [(9, 4100, 16), (16, 100, 8), (3, 9, 4), (5, 7, 0), (1, 1, 1)]:
        rng = np.random.default_rng(rows)
        left = rng.standard_normal((rows, rank)).astype(np.float32)
        right = rng.standard_normal((rank, columns)).astype(dtype)
        base = rng.standard_normal((rows, columns)).astype(base_dtype)
        zeros, product = np.zeros((2, rows, columns), np.float32)
        merge(zeros, left, right, 1.0, product)
        exact = left.astype(np.float64) @ right.astype(np.float64)
        assert np.abs(product - exact).max() < 1e-5
        expected = rounded(base.astype(np.float32) + product * np.float32(0.3), base_dtype)
        for one in (left, np.asfortranarray(left)):
            for other in (right, np.asfortranarray(right)):
                out = np.empty_like(base)
                merge(base, one, other, 0.3, out)
                assert np.array_equal(out, expected)
        merge(base, left, right, 0.3, base)
        assert np.array_equal(base, expected)


def test_a_cut_merge_is_the_whole_one(computing):
    left, right = matrices(16, 700, 40)[1], matrices(5000, 8, 40)[0]
    left = np.ascontiguousarray(left)
    base = np.random.default_rng(5).standard_normal((700, 5000)).astype(np.float32)
    whole, cut = np.empty_like(base), np.empty_like(base)
    merge(base, left, right, 0.7, whole)
    for rows in (slice(0, 1), slice(1, 333), slice(333, 700)):
        for columns in (slice(0, 1001), slice(1001, 5000)):
            merge(base[rows, columns], left[rows], right[:, columns], 0.7, cut[rows, columns])
    assert np.array_equal(cut, whole)


def test_new_zeros_take_no_memory(computing):
    one = LoraAdapter.new(64, 1 << 20, LoraConfig(rank=8))
    assert not one.apply(np.ones((2, 64), np.float32)).any()
    if computing is not None:
        assert one._product.matrices[1].strides[0] == 0


def test_sixteen_bit_matrices_are_multiplied_in_place(computing):
    if computing is None:
        pytest.skip("NumPy widens them for each call")
    a_matrix, b_matrix = matrices(16, 8, 4, ml_dtypes.bfloat16)
    one = LoraAdapter(LoraConfig(rank=4), a_matrix, b_matrix, 1.0)
    one.make_ready()
    assert one.is_ready
    assert one._product.matrices[0] is a_matrix
    assert one._product.matrices[1] is b_matrix


def test_a_batch_of_no_rows(computing):
    one = LoraAdapter(LoraConfig(rank=4), *matrices(16, 8, 4), 2.0)
    assert one.apply(np.empty((0, 16), np.float32)).shape == (0, 8)


def test_inputs_of_other_dtypes_are_cast(computing):
    one = LoraAdapter(LoraConfig(rank=4), *matrices(16, 8, 4), 2.0)
    x = np.arange(48).reshape(3, 16)
    expected = one.apply(x.astype(np.float32))
    for dtype in (np.int64, np.float64, np.float16, ">f4"):
        assert np.array_equal(one.apply(x.astype(dtype)), expected)


def test_what_does_not_fit_is_refused(computing):
    one = LoraAdapter(LoraConfig(rank=4), *matrices(16, 8, 4), 2.0)
    with pytest.raises(ValueError, match="one for each of 5 rows; got 3"):
        one.apply(np.ones((5, 16), np.float32), np.ones(3, np.float32))
    weights = np.zeros((8, 16), np.float32)
    for wrong in (np.asfortranarray(weights), np.broadcast_to(np.float32(0), (8, 16))):
        with pytest.raises(ValueError, match="C-contiguous"):
            one.merge_into_weights(wrong)
    left, right = one.b_matrix, one.a_matrix
    frozen = weights.copy()
    frozen.flags.writeable = False
    for first, second, out in (
        (left, right, frozen),
        (left, right, np.zeros((8, 17), np.float32)),
        (left[:, :3], right, weights),
        (left[:1], right, weights),
        (left, right[:, :1], weights),
    ):
        with pytest.raises(ValueError, match=r"read-only|shape|longer|not \(8, 16\)"):
            merge(weights, first, second, 1.0, out)
    assert not weights.any()
