"""Combinations of one module that are known by factors: the sum, slerp, TSV-M, Iso-C, KnOTS.

Each takes a term per set (None for a set that lacks the module, which counts as zero) and returns
factors; cutting them to a rank comes later.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bonsai_lora.core.factors import (
    NUMERIC_RANK,
    Factors,
    Term,
    Values,
    decompose,
    doubles,
    gram,
    polar,
    stack,
    triangle,
)
from bonsai_lora.core.prune import by_magnitude, mean_of_agreeing
from bonsai_lora.core.recipe import Recipe

Slot = Sequence[Term | None]
"""A term per set; None is a set that lacks the module."""

_PARALLEL = 0.9995
"""Cosine above which a spherical interpolation is linear, as in mergekit."""


def present(slot: Slot) -> list[Term]:
    """Return the terms of the sets that have the module."""
    return [term for term in slot if term is not None]


def _sum(slot: Slot, _weights: Sequence[float], _recipe: Recipe) -> Factors:
    return stack(present(slot))


def _slerp(slot: Slot, weights: Sequence[float], _recipe: Recipe) -> Factors:
    """Interpolate two deltas along the arc between their directions, as mergekit does.

    t = w2 / (w1 + w2); the deltas keep their lengths. A missing one is at a right angle.
    """
    t = weights[1] / (weights[0] + weights[1])
    own = [None if one is None else one._replace(weight=1.0) for one in slot]
    cosine = _cosine(*own)
    if abs(cosine) > _PARALLEL:
        shares = (1 - t, t)
    else:
        angle = math.acos(cosine)
        shares = (
            math.sin((1 - t) * angle) / math.sin(angle),
            math.sin(t * angle) / math.sin(angle),
        )
    return stack(
        [
            one._replace(weight=share)
            for one, share in zip(own, shares, strict=True)
            if one is not None
        ]
    )


def _cosine(first: Term | None, second: Term | None) -> float:
    if first is None or second is None:
        return 0.0
    products = gram([first, second])
    lengths = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
    return max(-1.0, min(1.0, products[0, 1] / lengths)) if lengths else 0.0


def _tsv(slot: Slot, _weights: Sequence[float], recipe: Recipe) -> Factors:
    """Make the singular vectors of all deltas orthogonal to each other (TSV-M).

    Gargiulo et al. 2025, "Task Singular Vectors", algorithm 1. With a rank, each delta keeps its
    first rank / number-of-sets vectors, else all.
    """
    terms = present(slot)
    most = None if recipe.rank is None else max(1, recipe.rank // len(terms))
    found = [decompose(stack([term])).vectors() for term in terms]
    left = polar(np.concatenate([u[:, :most] for u, _, _ in found], axis=1))
    right = polar(np.concatenate([vt[:most] for _, _, vt in found]).T)
    roots = np.sqrt(np.concatenate([values[:most] for _, values, _ in found]))
    return Factors(left * roots, roots[:, None] * right.T)


def _iso_c(slot: Slot, _weights: Sequence[float], _recipe: Recipe) -> Factors:
    """Give all singular directions of the sum their mean value (Iso-C: Marczak et al. 2025).

    The mean is over the values that are not zero, since the others have no direction by factors.
    """
    left, values, right = decompose(stack(present(slot))).vectors()
    root = math.sqrt(values.mean()) if len(values) else 0.0
    return Factors(left * root, root * right)


def _knots_ties(slot: Slot, _weights: Sequence[float], recipe: Recipe) -> Factors:
    """Merge by TIES in the basis that all deltas share (KnOTS: Stoica et al. 2025, section 4).

    The deltas side by side are U [P_1 … P_T]; the P_i are trimmed to the density and merged.
    """
    terms = present(slot)
    factors = [np.full(len(term.a), term.factor) for term in terms]
    left = stack(terms).left * np.concatenate(factors)
    small_left = triangle(left)  # (k, R)
    small_right = _block_diagonal([triangle(doubles(term.a).T).T for term in terms])
    u, values, vt = np.linalg.svd(small_left @ small_right, full_matrices=False)
    is_real = values > NUMERIC_RANK * values.max(initial=0.0)
    basis = left @ (small_right @ (vt[is_real].T / values[is_real]))  # U
    inside = u[:, is_real].T @ small_left
    ends = np.cumsum([len(term.a) for term in terms])
    parts = [
        _trimmed(inside[:, end - len(term.a) : end] @ doubles(term.a), recipe.kept)
        for end, term in zip(ends, terms, strict=True)
    ]
    return Factors(basis, mean_of_agreeing(parts))


def _block_diagonal(parts: Sequence[Values]) -> Values:
    rows = [part.shape[0] for part in parts]
    columns = [part.shape[1] for part in parts]
    result = np.zeros((sum(rows), sum(columns)))
    for part, row, column in zip(parts, np.cumsum(rows), np.cumsum(columns), strict=True):
        result[row - part.shape[0] : row, column - part.shape[1] : column] = part
    return result


def _trimmed(part: Values, density: float) -> Values:
    sizes = part.astype(np.float32)
    kept = by_magnitude(lambda: iter([sizes]), sizes.size, density)()(sizes)
    return np.where(kept != 0, part, 0.0)


BY_FACTORS: Mapping[str, Callable[[Slot, Sequence[float], Recipe], Factors]] = {
    "svd": _sum,
    "slerp": _slerp,
    "tsv": _tsv,
    "iso_c": _iso_c,
    "knots_ties": _knots_ties,
}
"""What each method by factors defines."""
