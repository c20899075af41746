"""Element-wise methods on whole deltas, row block by row block, and back to low rank.

A delta W is never held: its blocks are computed again for each pass. The passes: two for exact
thresholds or one for a rescaling, per summand, and four for the range finder.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from bonsai_lora.core.cast import Floats, to_float32
from bonsai_lora.core.factors import Factors, Term, decompose
from bonsai_lora.core.lowrank import columns_for, range_of
from bonsai_lora.core.merge import blocks
from bonsai_lora.core.prune import Blocks, merge_entries, prune_matrix
from bonsai_lora.core.recipe import Recipe

_BLOCK_VALUES = 1 << 18
"""Values of a block: 1 MiB, so that a block per summand stays in the cache."""


def pass_bytes(d_out: int, d_in: int, summands: int) -> int:
    """Return the most memory that the blocks of a pass take, and a bit for each entry, in bytes."""
    return max(_BLOCK_VALUES, d_in) * (8 * 4 + 4 * 6 * summands) + d_out * d_in // 8 * summands


def cut_delta(
    terms: Sequence[Term], recipe: Recipe, key: str, rank: int
) -> tuple[Factors, float, float]:
    """Return a low-rank approximation of an element-wise combination.

    With it the squared Frobenius norms of the combination and of the difference, which are exact:
    the approximation is a projection.
    """
    shape = len(terms[0].b), terms[0].a.shape[1]
    merged = _merged(terms, recipe, key)
    factors, total = range_of(merged, shape, columns_for(rank, *shape), f"{key}/range")
    svd = decompose(factors)
    kept = float(np.sum(svd.values[:rank] ** 2))
    return svd.cut(rank), total, max(0.0, total - kept)


def _merged(terms: Sequence[Term], recipe: Recipe, key: str) -> Blocks:
    """Return the row blocks of the combination."""
    starts = [
        prune_matrix(
            recipe,
            partial(_blocks_of, term),
            len(term.b) * term.a.shape[1],
            f"{key}/{index}",
        )
        for index, term in enumerate(terms)
    ]
    weights = [term.weight for term in terms]

    def run() -> Iterator[Floats]:
        passes = [map(start(), _blocks_of(term)) for start, term in zip(starts, terms, strict=True)]
        for parts in zip(*passes, strict=True):
            yield merge_entries(parts, weights, recipe)

    return run


def _blocks_of(term: Term) -> Iterator[Floats]:
    """Yield scaling * B @ A in float32 blocks of whole rows."""
    a_matrix, b_matrix = to_float32(term.a), to_float32(term.b)
    scaling = np.float32(term.scaling)
    shape = len(b_matrix), a_matrix.shape[1]
    for rows, _ in blocks(*shape, most=_BLOCK_VALUES, whole_rows=True):
        yield (b_matrix[rows] @ a_matrix) * scaling
