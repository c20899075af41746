"""W + scaling * B @ A in row blocks that stay in the cache."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from app.core.cast import FLOAT32, Array, Floats, round_to, to_float32
from app.core.products import multiply_outer

BLOCK_VALUES = 1 << 19
"""Values of W in a block that goes from one thread to another: 2 MiB of float32, measured by
benchmarks/merged.py. Smaller blocks cost more hand-overs."""
LONE_BLOCK_VALUES = 1 << 17
"""In a block of one thread by itself: it stays in the cache (benchmarks/merge.py)."""
SHARED_BLOCK_VALUES = 1 << 20
"""In a block of one thread beside others: they wait for each other at every step of a block."""

_SAFE_EXPONENT = 16
"""Powers of two up to this do not bring numbers of any use near the ends of float32."""

Block = tuple[slice, slice]
"""Rows and columns of W that lie together in memory: whole rows, or a piece of one row."""


def blocks(
    d_out: int, d_in: int, *, most: int = BLOCK_VALUES, whole_rows: bool = False
) -> Iterator[Block]:
    """Yield the blocks of W (d_out, d_in) in the order of memory, each of at most so many values.

    With `whole_rows` a block is never less than a row, however long that is.
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


def merge_rows(
    rows: Array,
    a_columns: Floats,
    b_rows: Floats,
    scaling: float,
    *,
    out: Array,
    magnitude: Floats | None = None,
) -> None:
    """Write rows + scaling * b_rows @ a_columns to `out` (n, m), which may be `rows` itself.

    With `magnitude` (n,), of DoRA, each row of the sum is scaled to that norm; the rows must be
    whole then. Norms are summed in float64.

    `rows` and `out` have one dtype (float32, float16 or bfloat16); the sum is float32, rounded
    once to nearest even. The result is that of the reference's and PEFT's order (B @ A, times
    scaling, plus W), but near the ends of float32 where scaling is a power of two.
    """
    delta = _scratch("delta", rows.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # as torch: sums beyond float32 are infinite
        fraction, exponent = math.frexp(scaling)
        if scaling != 1.0 and abs(fraction) == 0.5 and abs(exponent) < _SAFE_EXPONENT:
            # A power of two only moves exponents, so it may come first: B is small, the delta not.
            b_rows, scaling = b_rows * np.float32(scaling), 1.0
        multiply_outer(b_rows, a_columns, delta)
        if scaling != 1.0:
            delta *= np.float32(scaling)
        if rows.dtype == FLOAT32 and magnitude is None:
            np.add(rows, delta, out=out)
            return
        delta += to_float32(rows, out=_scratch("base", rows.shape))
        if magnitude is not None:
            norms = np.sqrt(np.einsum("ij,ij->i", delta, delta, dtype=np.float64))
            delta *= (magnitude / norms.astype(np.float32))[:, None]
    round_to(delta, out)


@lru_cache(maxsize=4)
def workers(threads: int) -> ThreadPoolExecutor:
    """Return so many threads, which stay, and so does their scratch."""
    return ThreadPoolExecutor(threads, "merge")


_local = threading.local()


def _scratch(name: str, shape: tuple[int, ...]) -> Floats:
    """Return this thread's float32 scratch array of that name and shape, reused between calls."""
    size = math.prod(shape)
    buffer: Floats | None = getattr(_local, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(max(size, BLOCK_VALUES), FLOAT32)
        setattr(_local, name, buffer)
    return buffer[:size].reshape(shape)
