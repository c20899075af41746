"""W + scaling * B @ A, as a whole or in blocks."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bonsai_lora.core import backend
from bonsai_lora.core.cast import FLOAT32, Array, Floats, to_float32

BLOCK_VALUES = 1 << 19
"""Values of W in a block that one thread hands to another: 2 MiB of float32, chosen with
benchmarks/merged.py. Smaller blocks mean more hand-overs."""

Block = tuple[slice, slice]
"""Rows and columns of W that are contiguous in memory: whole rows, or a part of one row."""


def blocks(
    d_out: int, d_in: int, *, most: int = BLOCK_VALUES, whole_rows: bool = False
) -> Iterator[Block]:
    """Yield the blocks of W (d_out, d_in) in memory order, each with at most `most` values.

    With `whole_rows`, a block is at least one row, however long.
    """
    if d_in == 0:
        return
    if whole_rows or d_in <= most:
        step = max(1, most // d_in)
        for start in range(0, d_out, step):
            yield slice(start, min(start + step, d_out)), slice(0, d_in)
        return
    for row in range(d_out):
        for start in range(0, d_in, most):
            yield slice(row, row + 1), slice(start, min(start + most, d_in))


def sampled_rows(rows: int, columns: int, *, most: int, distance: int) -> Iterator[Block]:
    """Yield a matrix of up to `most` values as one block, of a larger one rows at this distance."""
    if rows * columns > most:
        for row in range(0, rows, max(1, distance)):
            yield slice(row, row + 1), slice(0, columns)
    elif rows * columns:
        yield slice(0, rows), slice(0, columns)


def stacked_rows(rows: slice, height: int) -> Iterator[tuple[int, slice]]:
    """Yield which matrices of a stack have `rows`, counted over all, and which of their own.

    Each matrix has `height` rows.
    """
    for number in range(rows.start // height, -(-rows.stop // height)):
        first = max(rows.start - number * height, 0)
        yield number, slice(first, min(rows.stop - number * height, height))


def merge_rows(
    rows: Array,
    right: Array,
    left: Floats,
    scaling: float,
    *,
    out: Array,
    magnitude: Floats | None = None,
) -> None:
    """Write rows + scaling * left @ right to `out` (n, m), which may be `rows` itself.

    The factors are B (n, r) and A (r, m), as `LoraAdapter.stored_factors_of` returns them. With
    DoRA's `magnitude` (n,), each row of the sum is scaled to that norm, which needs whole rows.
    Norms are summed in float64.

    `rows` and `out` have the same dtype. The sum is float32 (float64 for float64 rows), in the
    order of the reference and of PEFT (B @ A, times scaling, plus W), and is rounded once, to
    nearest even. Sums beyond float32 are infinite, as in torch. No number depends on its block.
    """
    if magnitude is None:
        backend.merge(rows, left, right, scaling, out)
        return
    total = to_float32(rows, out=np.empty(rows.shape, FLOAT32))
    backend.merge(total, left, right, scaling, total)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        norms = np.sqrt(row_squares(total)).astype(np.float32)
        total *= (magnitude / norms)[:, None]
    backend.cast(total, out)


def row_squares(block: Floats) -> npt.NDArray[np.float64]:
    """Return the sum of the squares of each row (n,), independent of the other rows."""
    # Square first: a sum that also casts is split at the edges of NumPy's buffer.
    squares: npt.NDArray[np.float64] = np.square(block, dtype=np.float64)
    sums: npt.NDArray[np.float64] = squares.sum(axis=1)
    return sums
