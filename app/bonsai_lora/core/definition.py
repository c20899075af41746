"""The definition of every number that this package computes: five functions in NumPy.

`kernels` computes the same, faster: merges, casts and numbers in JSON are equal to the bit, applies
agree within 1e-6 of |x| * |delta W|. `backend` chooses between the two.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


_BLOCK_VALUES = 1 << 16
"""Values of a merge that are computed at a time, so that intermediate results stay in the cache."""


class NumberList(NamedTuple):
    """A list of numbers in JSON text, or a list of equally long lists of numbers."""

    start: int
    end: int
    numbers: Floats
    """(n,) or (rows, n)"""


def apply(a_matrix: Array, b_matrix: Array, x: Array, factors: Floats) -> Floats:
    """Return factor * (x A^T) B^T, (n, d_in) -> (n, d_out) (Hu et al. 2021, equation 3).

    A is (r, d_in), B (d_out, r), of any float dtype; `factors` is (1,) or one per row (n,).
    Rows are computed one by one, so that a row's outputs never depend on its batch. 16-bit matrices
    are widened in each call: keeping float32 copies would triple an adapter's memory.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        a, b, x = (np.require(one, np.float32, ["C", "A"]) for one in (a_matrix, b_matrix, x))
        outputs = np.empty((len(x), len(b)), np.float32)
        for row, factor, output in zip(x, np.broadcast_to(factors, len(x)), outputs, strict=True):
            hidden = a @ row  # (r,)
            np.multiply(b @ hidden, factor, out=output)  # (d_out,)
    return outputs


def merge(base: Array, left: Floats, right: Array, factor: float, out: Array) -> None:
    """Write base + factor * left @ right to `out`, which may be `base`: (n, r) and (r, m).

    This is a loop over the rank that rounds after each operation, without BLAS or fused
    multiply-adds, so that no number depends on the block that is merged, the CPU or a library. The
    sum is float32 (float64 for a float64 base) and is rounded to `out` once, to nearest even. NaNs
    are written as by `cast`. Raises ValueError if the shapes do not fit.
    """
    if base.shape != (left.shape[0], right.shape[1]):
        raise ValueError(f"a product of {left.shape} and {right.shape} is not {base.shape}")
    dtype = np.dtype(np.float64 if base.dtype == np.float64 else np.float32)
    right = right.astype(dtype)
    rows = max(1, _BLOCK_VALUES // max(1, right.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        for block in (slice(first, first + rows) for first in range(0, len(base), rows)):
            product, step = np.zeros((2, *base[block].shape), dtype)
            for column, row in zip(left[block].T.astype(dtype), right, strict=True):
                np.multiply(column[:, None], row, out=step)
                np.add(product, step, out=product)
            np.multiply(product, dtype.type(factor), out=product)
            np.add(base[block].astype(dtype), product, out=product)
            cast(product, out[block])


def cast(array: Array, out: Array) -> None:
    """Write `array` to `out` of the same shape, rounded to nearest even, or infinite on overflow.

    All NaNs are written as one, positive and quiet, because CPUs produce different ones.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, array, casting="same_kind")
    np.copyto(out, np.array(np.nan, out.dtype), where=np.isnan(out))


def find_lists(text: bytes | memoryview, least: int) -> list[NumberList]:  # noqa: ARG001
    """Return the lists of at least `least` numbers that are parsed ahead of the rest of JSON text.

    That is none: orjson parses them with the rest, each number as a float64, which is rounded to
    float32 later. The kernel parses them first, to the same numbers.
    """
    return []


def list_of(array: Floats) -> memoryview:
    """Return a float32 array (n,) or (rows, n), all finite, as a JSON list.

    Each number is the shortest decimal that reads back as the same float32. Raises ValueError for
    any other dtype or number of dimensions.
    """
    if array.dtype != np.float32 or array.ndim not in (1, 2):
        raise ValueError(f"expected float32 (n,) or (rows, n); got {array.dtype} {array.shape}")
    contiguous = np.ascontiguousarray(array)
    return memoryview(orjson.dumps(contiguous, option=orjson.OPT_SERIALIZE_NUMPY))
