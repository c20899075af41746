"""What is computed, in NumPy: five functions that define every number this package makes.

`kernels` computes the same, faster: merges, casts and numbers in JSON equal these functions to the
bit, applies within 1e-6 of |x| * |delta W|. `backend` chooses between the two.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


_BLOCK_VALUES = 1 << 16
"""Of a merge that are computed together: they stay in the cache, and take no memory."""


class NumberList(NamedTuple):
    """A list of numbers in JSON text, or a list of equally long lists of numbers."""

    start: int
    end: int
    numbers: Floats
    """(n,) or (rows, n)"""


def apply(a_matrix: Array, b_matrix: Array, x: Array, factors: Floats) -> Floats:
    """Return factor * (x A^T) B^T, (n, d_in) -> (n, d_out) (Hu et al. 2021, equation 3).

    A is (r, d_in), B (d_out, r), of any float dtype; `factors` is (1,) or one per row (n,).
    Row by row, so that a row's outputs never depend on its batch. 16-bit matrices are widened anew
    for each call: float32 copies of them would take twice an adapter's memory.
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

    A loop over the rank, each operation rounded once, without BLAS and fused multiply-adds: so no
    number depends on the block that is merged, on the CPU or on a library. The sum is float32 (for
    a float64 base float64), rounded to `out` once, to nearest even. NaNs are written as `cast`
    does. Raises ValueError where the shapes do not fit.
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
    """Write `array` to `out`, of one shape, rounded to nearest even; beyond its range is infinity.

    Every NaN is written as the same one, positive and quiet: CPUs make different ones.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, array, casting="same_kind")
    np.copyto(out, np.array(np.nan, out.dtype), where=np.isnan(out))


def find_lists(text: bytes | memoryview, least: int) -> list[NumberList]:  # noqa: ARG001
    """Return the lists of at least so many numbers in JSON text that are read ahead of the rest.

    None are: orjson reads them with the rest, each number as a float64, which is rounded to
    float32. The kernel finds and reads them first, and gives the same numbers.
    """
    return []


def list_of(array: Floats) -> memoryview:
    """Return a float32 array (n,) or (rows, n), all finite, as a JSON list.

    Each number is the shortest decimal that reads back as the same float32. Raises ValueError for
    another dtype or more dimensions.
    """
    if array.dtype != np.float32 or array.ndim not in (1, 2):
        raise ValueError(f"expected float32 (n,) or (rows, n); got {array.dtype} {array.shape}")
    contiguous = np.ascontiguousarray(array)
    return memoryview(orjson.dumps(contiguous, option=orjson.OPT_SERIALIZE_NUMPY))
