"""Combine the adapters of one module: by their factors, without the product of B and A.

The definition of each method is in docs/laboratory.md. Small matrices are float64; the new factors
are rounded to float32 once.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from operator import add

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array, Floats, all_finite, to_float32
from bonsai_lora.core.combine_deltas import cut_delta
from bonsai_lora.core.combine_factors import BY_FACTORS, Slot, present
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.factors import Factors, Svd, Term, decompose, doubles, gram, rank_for
from bonsai_lora.core.prune import merge_entries, prune_matrix
from bonsai_lora.core.recipe import Recipe
from bonsai_lora.errors import NonFiniteOutputError


@dataclass(frozen=True, slots=True)
class Loss:
    """What an approximation loses of its target, or several together; squares of norms."""

    target_square: float = 0.0
    """Of what is approximated; of a combination, what the method defines."""
    cut_square: float = 0.0
    """Of what was cut off to reach the rank."""
    error_square: float = 0.0
    """Of the difference to the target, or, for PEFT's types on factors, to the weighted sum."""

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(*map(add, astuple(self), astuple(other)))

    @property
    def energy_kept(self) -> float:
        """The share of the squared Frobenius norm that the rank keeps."""
        return 1 - self.cut_square / self.target_square if self.target_square else 1.0

    @property
    def relative_error(self) -> float:
        """The norm of the difference over that of the target."""
        return math.sqrt(self.error_square / self.target_square) if self.target_square else 0.0


@dataclass(frozen=True, slots=True)
class Combined:
    """The combination of one module, and what it lost."""

    adapter: LoraAdapter
    loss: Loss


_CANCELLED = 1e-12
"""Squared differences below this share of their parts are rounding errors."""

Matrices = tuple[Array, Array]
"""A (r, d_in) and B (d_out, r)."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The result for one expert."""

    matrices: Matrices
    loss: Loss = field(default_factory=Loss)


def combine(
    module: str,
    adapters: Sequence[LoraAdapter | None],
    weights: Sequence[float],
    recipe: Recipe,
    default_rank: int,
) -> Combined:
    """Return the combination of a module's adapters; None is a set that lacks the module.

    Their shapes, layers and experts agree; with a method on factors, their ranks too.
    `default_rank` is for methods on deltas and `svd` without a rank. Raises NonFiniteOutputError if
    a number overflows float32.
    """
    first = next(one for one in adapters if one is not None)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            parts = _combine_experts(module, adapters, weights, recipe, default_rank)
    except np.linalg.LinAlgError:  # of NaN and infinity
        raise _overflow(module) from None
    a_matrix, b_matrix = _join([part.matrices for part in parts])
    if not (all_finite(a_matrix) and all_finite(b_matrix)):
        raise _overflow(module)
    experts = first.experts
    rank = len(a_matrix) // (experts or 1)
    config = LoraConfig(rank, float(rank), 0.0, first.config.target_modules)
    return Combined(
        LoraAdapter(config, a_matrix, b_matrix, config.scaling, layer=first.layer, experts=experts),
        sum((part.loss for part in parts), Loss()),
    )


def _overflow(module: str) -> NonFiniteOutputError:
    return NonFiniteOutputError(
        f"the combination of module {module!r} overflows float32; use smaller weights",
        module=module,
    )


def _combine_experts(
    module: str,
    adapters: Sequence[LoraAdapter | None],
    weights: Sequence[float],
    recipe: Recipe,
    default_rank: int,
) -> list[_Part]:
    slots = _slots(adapters, weights)
    if recipe.method in BY_FACTORS:
        return _by_svd(slots, weights, recipe, default_rank)
    parts = []
    for expert, slot in enumerate(slots):
        terms = present(slot)
        key = f"{recipe.seed or 0}/{module}/{expert}"
        if recipe.is_on_factors:
            parts.append(_on_factors(terms, recipe, key))
        elif recipe.is_on_deltas:
            parts.append(_on_deltas(terms, recipe, key, recipe.rank or default_rank))
        else:
            parts.append(_Part(_stacked(terms)))
    return parts


def _slots(adapters: Sequence[LoraAdapter | None], weights: Sequence[float]) -> list[Slot]:
    """Return the terms of each expert; of an ordinary module, one slot."""
    # Exchanged factors stay so: they are combined as they are stored.
    each = [None if one is None else replace(one, layer="linear").each_expert for one in adapters]
    count = max(len(one) for one in each if one is not None)
    return [
        [
            None
            if one is None
            else Term(one[expert].a_matrix, one[expert].b_matrix, one[expert].scaling, weight)
            for one, weight in zip(each, weights, strict=True)
        ]
        for expert in range(count)
    ]


def _join(parts: Sequence[Matrices]) -> Matrices:
    """Return fused A (E * r, d_in) and B (d_out, r * E) of each expert's matrices."""
    if len(parts) == 1:
        return parts[0]
    a_matrix = np.concatenate([a for a, _ in parts])
    b_matrix = np.stack([b for _, b in parts], axis=2)  # (d_out, r, E)
    return a_matrix, b_matrix.reshape(len(b_matrix), -1)


def _stacked(terms: Sequence[Term]) -> Matrices:
    """Return [factor * A] and [B], whose product is exactly the sum (PEFT's `cat`)."""
    return (
        np.concatenate([(term.factor * doubles(term.a)).astype(np.float32) for term in terms]),
        np.concatenate([to_float32(term.b) for term in terms], axis=1),
    )


# PEFT's types on factors: peft 0.21.2, tuners/lora/model.py,
# _generalized_task_arithmetic_weighted_adapter. A and B each get the root of |factor|, A its sign.


def _on_factors(terms: Sequence[Term], recipe: Recipe, key: str) -> _Part:
    roots = [math.sqrt(abs(term.factor)) for term in terms]
    signed = [math.copysign(root, term.factor) for root, term in zip(roots, terms, strict=True)]
    a_matrix = _merge_arrays([to_float32(term.a) for term in terms], signed, recipe, f"{key}/A")
    b_matrix = _merge_arrays([to_float32(term.b) for term in terms], roots, recipe, f"{key}/B")
    if not (all_finite(a_matrix) and all_finite(b_matrix)):
        return _Part((a_matrix, b_matrix))  # which the caller refuses
    products = gram([Term(a_matrix, b_matrix, -1.0), *terms])
    error = float(products.sum())
    if error < _CANCELLED * float(np.abs(products).sum()):
        error = 0.0
    target = max(0.0, float(products[1:, 1:].sum()))
    return _Part((a_matrix, b_matrix), Loss(target, error_square=error))


def _merge_arrays(
    arrays: Sequence[Floats], weights: Sequence[float], recipe: Recipe, key: str
) -> Floats:
    """Return one matrix of several, as PEFT merges task tensors (utils/merge_utils.py)."""
    kept = []
    for index, array in enumerate(arrays):
        start = prune_matrix(recipe, partial(iter, [array]), array.size, f"{key}/{index}")
        kept.append(start()(array))
    return merge_entries(kept, weights, recipe)


def _on_deltas(terms: Sequence[Term], recipe: Recipe, key: str, rank: int) -> _Part:
    factors, total, cut = cut_delta(terms, recipe, key, rank)
    return _Part(_rounded(factors), Loss(total, cut, cut))


def _rounded(factors: Factors) -> Matrices:
    return factors.right.astype(np.float32), factors.left.astype(np.float32)


# Methods whose result is known by factors, and cut to a rank by its singular values.


def _by_svd(
    slots: Sequence[Slot], weights: Sequence[float], recipe: Recipe, default_rank: int
) -> list[_Part]:
    """Return the results of the experts, cut to one rank: the highest that any of them needs."""
    found = [BY_FACTORS[recipe.method](slot, weights, recipe) for slot in slots]
    is_cut = recipe.energy is not None or (recipe.rank is not None and recipe.method != "tsv")
    if not is_cut and recipe.method != "svd":
        most = max(len(one.right) for one in found)
        return [_Part(_rounded(_padded(one, most))) for one in found]
    svds = [_svd_of(one, recipe) for one in found]
    rank = recipe.rank or default_rank
    if recipe.energy is not None:
        rank = max(rank_for(one.values, recipe.energy) for one in svds)
    most = max(min(rank, len(one.values)) for one in svds)
    return [_cut(svd, rank, most) for svd in svds]


def _svd_of(factors: Factors, recipe: Recipe) -> Svd:
    if recipe.method != "iso_c":
        return decompose(factors)
    # All values are equal; the order of the sum's singular vectors must stay.
    level = np.square(factors.right).sum(axis=1)
    root = np.diag(np.sqrt(level))
    return Svd(factors, root, level, root)


def _cut(svd: Svd, rank: int, padded_rank: int) -> _Part:
    squares = svd.values**2
    cut = float(squares[rank:].sum())
    matrices = _rounded(_padded(svd.cut(rank), padded_rank))
    return _Part(matrices, Loss(float(squares.sum()), cut, cut))


def _padded(factors: Factors, rank: int) -> Factors:
    """Return factors of this rank, and at least 1, by adding zeros: PEFT has no rank 0."""
    missing = max(1, rank) - len(factors.right)
    return Factors(
        np.pad(factors.left, ((0, 0), (0, missing))), np.pad(factors.right, ((0, missing), (0, 0)))
    )
