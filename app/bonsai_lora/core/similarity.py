"""How alike deltas are, by small Gram matrices of their factors."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.factors import Term, Values, decompose, gram, stack


@dataclass(frozen=True, slots=True)
class Similarity:
    """The inner products of several deltas, (n, n) float64, and what follows from them."""

    gram: Values

    @property
    def norms(self) -> Values:
        """The Frobenius norms, (n,)."""
        lengths: Values = np.sqrt(np.maximum(np.diagonal(self.gram), 0.0))
        return lengths

    @property
    def cosine(self) -> Values:
        """The cosines, (n, n); 0 with a delta that is zero."""
        norms = self.norms
        outer = np.outer(norms, norms)
        cosines = np.zeros_like(self.gram)
        np.divide(self.gram, outer, out=cosines, where=outer > 0)
        np.clip(cosines, -1.0, 1.0, out=cosines)
        np.fill_diagonal(cosines, (norms > 0).astype(np.float64))
        return cosines

    @property
    def interference(self) -> float:
        """1 - |sum|^2 / (sum of norms)^2: 0 if all point one way, near 1 if they cancel.

        n orthogonal deltas of one length have 1 - 1/n.
        """
        total = float(self.norms.sum())
        return min(1.0, max(0.0, 1 - float(self.gram.sum()) / total**2)) if total else 0.0


def similarity(adapters: Sequence[LoraAdapter | None]) -> Similarity:
    """Return the similarity of a module's deltas; None is a set that lacks the module.

    Fused experts count as one delta.
    """
    places = [place for place, one in enumerate(adapters) if one is not None]
    each = [one.each_expert for one in adapters if one is not None]
    found = np.zeros((len(adapters), len(adapters)))
    for experts in zip(*each, strict=True):
        terms = [Term(one.a_matrix, one.b_matrix, one.scaling) for one in experts]
        found[np.ix_(places, places)] += gram(terms)
    return Similarity(found)


def joint(parts: Iterable[Similarity], count: int) -> Similarity:
    """Return the similarity of `count` sets over all modules."""
    return Similarity(sum((one.gram for one in parts), np.zeros((count, count))))


def subspace_similarity(first: LoraAdapter, second: LoraAdapter) -> float:
    """Return |V_1^T V_2|^2 / min(r_1, r_2) of the right singular vectors, from 0 to 1.

    Hu et al. 2021, equation 4, for all directions of both; the mean over fused experts. 0 if a
    delta is zero.
    """
    found = []
    for pair in zip(first.each_expert, second.each_expert, strict=True):
        ours, theirs = (
            decompose(stack([Term(one.a_matrix, one.b_matrix)])).vectors()[2] for one in pair
        )
        least = min(len(ours), len(theirs))
        found.append(float(np.square(ours @ theirs.T).sum()) / least if least else 0.0)
    return math.fsum(found) / len(found)
