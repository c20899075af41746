"""Matrices known by thin factors: singular values, norms and truncation without the product.

A d_out x d_in matrix of rank R costs O(R^2 (d_in + d_out)) here, and R^3 for one small SVD in
float64. Nothing squares the condition of the factors, so small singular values keep their digits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.cast import Array, to_float32

Values = npt.NDArray[np.float64]

NUMERIC_RANK = 1e-10
"""Singular values below this share of |left| * |right| are rounding errors of float32 factors."""


class Term(NamedTuple):
    """One summand of a combination: weight * scaling * b @ a."""

    a: Array
    """A, shape (r, d_in), any float dtype."""
    b: Array
    """B, shape (d_out, r)."""
    scaling: float = 1.0
    weight: float = 1.0

    @property
    def factor(self) -> float:
        """Weight times scaling."""
        return self.weight * self.scaling


class Factors(NamedTuple):
    """The matrix left @ right, (d_out, d_in)."""

    left: Values
    """Shape (d_out, R)."""
    right: Values
    """Shape (R, d_in)."""


class Svd(NamedTuple):
    """Singular values of a product, and the small matrices that lead to its singular vectors."""

    factors: Factors
    to_left: Values
    """(R, k): left @ to_left has the left singular vectors times the values."""
    values: Values
    """(k,), largest first."""
    to_right: Values
    """(k, R): to_right @ right has the values times the right singular vectors."""

    def cut(self, rank: int) -> Factors:
        """Return the best approximation of this rank (Eckart and Young 1936), balanced.

        Both factors get the square roots of the singular values.
        """
        values = self.values[:rank]
        inverse = np.zeros_like(values)
        np.divide(1, np.sqrt(values), out=inverse, where=values > self._noise())
        return Factors(
            self.factors.left @ (self.to_left[:, :rank] * inverse),
            (inverse[:, None] * self.to_right[:rank]) @ self.factors.right,
        )

    def vectors(self) -> tuple[Values, Values, Values]:
        """Return U (d_out, k), the k values that are not rounding errors, and V^T (k, d_in)."""
        rank = int(np.count_nonzero(self.values > self._noise()))
        values = self.values[:rank]
        left = self.factors.left @ (self.to_left[:, :rank] / values)
        return left, values, (self.to_right[:rank] / values[:, None]) @ self.factors.right

    def _noise(self) -> float:
        return NUMERIC_RANK * float(self.values[0]) if len(self.values) else 0.0


def doubles(array: Array) -> Values:
    """Return an array of any float dtype as float64."""
    return to_float32(array).astype(np.float64)


def stack(terms: Sequence[Term]) -> Factors:
    """Return the sum of the terms."""
    left = np.concatenate([doubles(term.b) for term in terms], axis=1)
    right = np.concatenate([term.factor * doubles(term.a) for term in terms])
    return Factors(left, right)


def decompose(factors: Factors) -> Svd:
    """Return the singular value decomposition of a product.

    With left = Q S and right^T = P T, it is that of the small matrix S T^T = U E V^T. As left @ T^T
    @ V = Q U E, neither Q nor P is needed.
    """
    small_left = triangle(factors.left)  # (min(d_out, R), R)
    small_right = triangle(factors.right.T)
    u, values, vt = np.linalg.svd(small_left @ small_right.T, full_matrices=False)
    return Svd(factors, small_right.T @ vt.T, values, u.T @ small_left)


def gram(terms: Sequence[Term]) -> Values:
    """Return the inner products of the terms, (n, n), from two products of stacked factors.

    <D_i, D_j> = f_i f_j sum (B_i^T B_j) * (A_i A_j^T), O(R^2 (d_in + d_out)) for R ranks in all. A
    term of rank 0 is zero.
    """
    sums = np.zeros((len(terms), len(terms)))
    places = [place for place, term in enumerate(terms) if len(term.a)]
    if not places:
        return sums
    right = np.concatenate([terms[one].factor * doubles(terms[one].a) for one in places])
    left = np.concatenate([doubles(terms[one].b).T for one in places])
    products = (left @ left.T) * (right @ right.T)  # (R, R)
    starts = np.cumsum([0, *(len(terms[one].a) for one in places[:-1])])
    by_row = np.add.reduceat(products, starts, axis=0)
    sums[np.ix_(places, places)] = np.add.reduceat(by_row, starts, axis=1)
    return sums


def triangle(matrix: Values) -> Values:
    """Return R of matrix = Q R, whose Gram matrix is that of `matrix`; of a stack one each."""
    found: Values = np.linalg.qr(matrix, mode="r")  # type: ignore[assignment]  # of NumPy's stubs
    return found


def polar(matrix: Values) -> Values:
    """Return the nearest matrix with orthonormal columns; dependent columns share a direction.

    Its triangle W S Z^T gives matrix @ Z S^-1 Z^T (Gargiulo et al. 2025, section 4.3), where
    directions that are only rounding errors are left out.
    """
    _, values, zt = np.linalg.svd(triangle(matrix), full_matrices=False)
    is_real = values > NUMERIC_RANK * values.max(initial=0.0)
    kept = zt[is_real]
    result: Values = matrix @ (kept.T @ (kept / values[is_real, None]))
    return result


def rank_for(values: Values, energy: float) -> int:
    """Return the smallest k whose first k values have this share of the sum of squares.

    0 if all values are zero.
    """
    squares = np.cumsum(values * values)
    if not len(squares) or squares[-1] == 0:
        return 0
    return min(int(np.searchsorted(squares, energy * squares[-1])) + 1, len(squares))
