import ml_dtypes
import numpy as np
import pytest

from bonsai_lora.core import backend
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, all_finite, count_rows, to_float32

SIXTEEN = [FLOAT16, BFLOAT16]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_widening_every_value_is_exact(computing, dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    got, expected = to_float32(every), every.astype(np.float32)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_narrowing_equals_numpy(computing, dtype, rng):
    values = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    got = np.empty(values.shape, dtype)
    backend.cast(values, got)
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    assert np.array_equal(got.view(np.uint16), expected.view(np.uint16))


def test_float32_comes_back_as_it_is():
    array = np.ones((2, 3), np.float32)
    assert to_float32(array) is array


def test_unaligned_and_float64_inputs(computing):
    raw = bytearray(1 + 8 * 4)
    unaligned = np.frombuffer(raw, FLOAT16, 4, offset=1)
    assert to_float32(unaligned).tolist() == [0, 0, 0, 0]
    assert to_float32(np.array([1e300, -0.5])).tolist() == [np.inf, -0.5]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(dtype):
    assert all_finite(np.zeros(0, dtype))
    largest = ml_dtypes.finfo(dtype).max
    assert all_finite(np.array([0.0, -1.5, largest, -largest], dtype))
    for bad in (np.nan, np.inf, -np.inf):
        assert not all_finite(np.array([1.0, bad, 2.0], dtype))


def test_one_vector_is_one_row():
    shapes = [(3,), (1, 3), (5, 3), (0, 3)]
    assert [count_rows(np.zeros(shape, np.float32)) for shape in shapes] == [1, 1, 5, 0]
