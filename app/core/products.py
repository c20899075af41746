"""The thin products of an apply and of a merge, in the forms that are fastest.

OpenBLAS repacks both matrices before it multiplies, which costs as much as a thin product itself.
Its kernels for AVX-512 do without where a product is small, so large ones go there in pieces; those
for AVX2 never do, and take few rows best one by one. All rules are by measurement, with both kinds
and with one thread and two (benchmarks/apply.py, docs/decisions/0013-layout.md).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import threadpoolctl

from app.core.cast import FLOAT32, Array, Floats, count_rows

SMALL_OPERATIONS = 1_000_000
"""Multiply-adds up to which OpenBLAS for AVX-512 does not repack (interface/gemm.c there)."""
LARGE_VALUES = 1 << 18
"""An A with so many values is read from far away, which is what its products cost then."""
_LEAST_ROWS = 4
_MOST_ROWS = 16
"""Of a piece: shorter ones are all overhead, longer ones no faster."""


class Kernels(NamedTuple):
    """How NumPy's OpenBLAS works here."""

    has_small: bool
    """Whether small products are computed without repacking."""
    threads: int


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """Return the kernels that this process uses, as they are when first asked for."""
    for library in threadpoolctl.threadpool_info():
        if library["internal_api"] == "openblas":
            has_small = library["architecture"] in ("SkylakeX", "Cooperlake", "SapphireRapids")
            return Kernels(has_small, library["num_threads"])
    return Kernels(has_small=False, threads=1)


def multiply_down(x: Floats, a_rows: Array, a_matrix: Floats) -> Floats:
    """Return x A^T, (d_in,) -> (r,) or (n, d_in) -> (n, r).

    `a_rows` is A (r, d_in) as it is stored, row by row, and used so where it is float32;
    `a_matrix` is A as `LoraAdapter.factors` has it.
    """
    rows = count_rows(x)
    is_usable = a_rows.dtype == FLOAT32 and a_rows.flags.c_contiguous
    few = a_rows if is_usable else a_matrix  # what few rows go through
    if rows == 1:
        return _dot(x, few.T)
    has_small, threads = kernels()
    if threads > 1 and few.size >= LARGE_VALUES and rows <= _MOST_ROWS:
        return _row_by_row(x, few) if rows <= _MOST_ROWS // 2 else _dot(few, x.T).T
    if not has_small:
        return _row_by_row(x, few) if rows < _LEAST_ROWS else _dot(x, a_matrix.T)
    if rows <= _MOST_ROWS and _piece(rows * x.shape[1]) >= _LEAST_ROWS:
        return _in_pieces(few, x.T, _piece(rows * x.shape[1])).T
    piece = _piece(few.size)
    return _in_pieces(x, few.T, piece) if piece == _MOST_ROWS else _dot(x, a_matrix.T)


def multiply_up(hidden: Floats, b_matrix: Floats) -> Floats:
    """Return hidden B^T, (r,) -> (d_out,) or (n, r) -> (n, d_out); B is (d_out, r)."""
    rows, rank = count_rows(hidden), b_matrix.shape[1]
    has_small, threads = kernels()
    piece = _piece(b_matrix.size)
    least = _MOST_ROWS if threads > 1 else _LEAST_ROWS
    few = rank <= _MOST_ROWS or rows <= 2 * _MOST_ROWS
    if has_small and rows > piece >= least and few:
        return _in_pieces(hidden, b_matrix.T, piece)
    return _dot(hidden, b_matrix.T)


def multiply_outer(b_rows: Floats, a_columns: Floats, out: Floats) -> None:
    """Write b_rows @ a_columns, (n, r) and (r, m), to `out` (n, m), which is C-contiguous."""
    piece = _piece(a_columns.size)
    together = len(b_rows) - len(b_rows) % piece if piece else 0
    if not kernels().has_small or piece < _LEAST_ROWS or not together:
        np.matmul(b_rows, a_columns, out=out)
        return
    # Small products in one call: a stack of them.
    stacked = b_rows[:together].reshape(together // piece, piece, b_rows.shape[1])
    target = out[:together].reshape(together // piece, piece, out.shape[1])
    np.matmul(stacked, a_columns, out=target)
    if together < len(b_rows):
        np.matmul(b_rows[together:], a_columns, out=out[together:])


def _piece(operations: int) -> int:
    """Return how many rows of so many multiply-adds are small: a power of two up to _MOST_ROWS."""
    fitting = SMALL_OPERATIONS // max(1, operations)
    return min(_MOST_ROWS, 1 << fitting.bit_length() >> 1)


def _dot(left: Floats, right: Floats) -> Floats:
    product: Floats = np.dot(left, right)
    return product


def _in_pieces(left: Floats, right: Floats, piece: int) -> Floats:
    """Return left @ right, made of so many rows at a time."""
    if len(left) <= piece:
        return _dot(left, right)
    product = np.empty((len(left), right.shape[1]), FLOAT32)
    for start in range(0, len(left), piece):
        block = slice(start, start + piece)
        np.dot(left[block], right, out=product[block])
    return product


def _row_by_row(x: Floats, a_rows: Floats) -> Floats:
    """Return x A^T by a matrix-vector product for each row, going through A once.

    Blocks of A stay in the cache from one row of x to the next.
    """
    hidden = np.empty((len(x), len(a_rows)), FLOAT32)
    # Several threads share out a whole matrix among them.
    values = LARGE_VALUES if kernels().threads == 1 else a_rows.size
    step = max(1, values // max(1, x.shape[1]))
    for start in range(0, len(a_rows), step):
        block = slice(start, start + step)
        for row, product in zip(x, hidden, strict=True):
            np.dot(a_rows[block], row, out=product[block])
    return hidden
