"""Matrices that come as row blocks, any number of times: their best approximations of low rank."""

from dataclasses import dataclass

import numpy as np

from bonsai_lora.core.cast import Array
from bonsai_lora.core.factors import Factors, Values, decompose, rank_for
from bonsai_lora.core.prune import Blocks, Draws

_FEWEST_COLUMNS = 32
"""Fewest columns of the range finder. It has at least twice the rank, as the singular values of
trimmed deltas and of fine-tuned weights fall slowly (Halko et al. 2011, section 4.2, which adds 5
or 10 to the rank)."""
_ALL = 1 - 1e-12
"""A share of the squares that is all but rounding errors."""


def columns_for(rank: int, d_out: int, d_in: int) -> int:
    """Return the number of columns of the range finder."""
    return min(max(2 * rank, _FEWEST_COLUMNS), d_out, d_in)


@dataclass(frozen=True, slots=True)
class Approximation:
    """A matrix of low rank near a matrix M."""

    factors: Factors
    lost_square: float
    """Squared Frobenius norm of the difference to M, which is exact up to rounding."""

    @property
    def rank(self) -> int:
        """Number of columns of the left factor."""
        return len(self.factors.right)


def approximate(
    blocks: Blocks, shape: tuple[int, int], key: str, rank: int, energy: float | None = None
) -> Approximation:
    """Return an approximation of M (d_out, d_in) of at most this rank.

    With `energy`, of the least rank that keeps this share of the squared norm. `key` is the seed.
    Reads the blocks four times, with `energy` several times that.
    """
    columns = columns_for(rank if energy is None else _FEWEST_COLUMNS // 2, *shape)
    while True:
        factors, total = range_of(blocks, shape, columns, key)
        svd = decompose(factors)
        squares = np.cumsum(svd.values**2)
        wanted = rank_for(svd.values[:rank], _ALL)
        if energy is not None:
            wanted = min(int(np.searchsorted(squares, energy * total)) + 1, wanted)
        # The last columns are inaccurate: the energy may have needed fewer of better ones.
        if energy is None or wanted <= columns // 2 or columns >= columns_for(rank, *shape):
            break
        columns = columns_for(columns, *shape)
    kept = float(squares[wanted - 1]) if wanted else 0.0
    return Approximation(svd.cut(wanted), max(0.0, total - kept))


def range_of(
    merged: Blocks, shape: tuple[int, int], columns: int, key: str
) -> tuple[Factors, float]:
    """Return M V V^T, where V (d_in, columns) spans nearly the first right singular vectors of M.

    And the squared Frobenius norm of M. V comes from three subspace iterations with M^T M (Halko et
    al. 2011, algorithm 4.4).
    """
    d_out, d_in = shape
    basis: Values = Draws(key).uniform((d_in, columns)) - 0.5
    for dtype in (np.float32, np.float32, np.float64):  # the last one decides the accuracy
        start: Array = np.linalg.qr(basis)[0].astype(dtype)
        basis = np.zeros((d_in, columns))
        for block in merged():
            wide: Array = block.astype(dtype, copy=False)
            basis += wide.T @ (wide @ start)
    basis = np.linalg.qr(basis)[0]
    left, row, total = np.empty((d_out, columns)), 0, 0.0
    for block in merged():
        last = block.astype(np.float64)
        left[row : row + len(block)] = last @ basis
        total += float(np.vdot(last, last))
        row += len(block)
    return Factors(left, basis.T), total
