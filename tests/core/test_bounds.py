"""The kernels touch no memory beside their arrays: pages around each forbid it."""

import ctypes
import mmap

import ml_dtypes
import numpy as np
import pytest

from bonsai_lora.core import definition

if not hasattr(mmap, "MAP_PRIVATE"):
    pytest.skip("needs mprotect", allow_module_level=True)

PAGE = mmap.PAGESIZE
FLOATS = [np.dtype(one) for one in (np.float32, np.float16, ml_dtypes.bfloat16)]


def fenced(array, side):
    """A copy that begins right behind a forbidden page, or ends right before one."""
    pages = max(1, -(-array.nbytes // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + (pages + 1) * PAGE):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = PAGE if side == "start" else (pages + 1) * PAGE - array.nbytes
    copy = np.ndarray(array.shape, array.dtype, memory, offset)
    copy[...] = array
    return copy


@pytest.fixture(params=["start", "end"])
def fence(request, rng):
    """Make fenced arrays of random numbers."""
    return lambda shape, dtype=np.float32: fenced(
        rng.standard_normal(shape).astype(dtype), request.param
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "d_in", "d_out", "r"), [(1, 1, 1, 1), (5, 33, 129, 7), (9, 65, 17, 16), (2, 130, 3, 100)])  # fmt: skip
def test_apply(kernels, fence, dtype, n, d_in, d_out, r):
    a, b, x = fence((r, d_in), dtype), fence((d_out, r), dtype), fence((n, d_in))
    factors = fence(n)
    function = kernels.make_apply(a, b)
    if function is None:
        pytest.skip("this CPU does not convert float16")
    right = definition.apply(a, b, x, factors)
    assert np.abs(function(x, factors) - right).max() <= 1e-4 * np.abs(right).max() + 1e-6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "m", "r"), [(1, 1, 1), (5, 33, 7), (3, 129, 16), (17, 65, 100)])
def test_merge_and_cast(kernels, fence, dtype, n, m, r):
    base, left, right = fence((n, m), dtype), fence((n, r)), fence((r, m), dtype)
    expected = np.empty_like(base)
    definition.merge(base, left, right, 0.5, expected)
    if kernels.merge(base, left, right, 0.5, base):
        assert base.tobytes() == expected.tobytes()
    wide = fence((n, m))
    if kernels.cast(base, wide):
        assert (wide == base.astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(1,), (7,), (33,), (3, 17), (2, 1)])
def test_json(kernels, fence, shape):
    numbers = fence(shape)
    text = kernels.list_of(numbers)
    assert bytes(text) == bytes(definition.list_of(numbers))
    for end in range(len(text) - 40, len(text) + 1):
        part = np.frombuffer(text, np.uint8)[: max(0, end)]
        for side in ("start", "end"):
            found = kernels.find_lists(fenced(part, side).data, 1)
            if end == len(text):
                assert found[0][2].tobytes() == numbers.tobytes()
