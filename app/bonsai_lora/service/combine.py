"""Combine sets into a new one: check everything, compute module by module, report, store."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bonsai_lora.core import combine
from bonsai_lora.core.combine import Combined, Loss
from bonsai_lora.core.combine_deltas import pass_bytes
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.lowrank import columns_for
from bonsai_lora.core.recipe import Recipe
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import InvalidRequestError, UnsupportedAdapterError
from bonsai_lora.formats.made_config import adapted_parameters, combined_config
from bonsai_lora.service.aligned import Aligned, align, present, read_sets, stacked_rank
from bonsai_lora.service.jobs import Progress
from bonsai_lora.service.sets import refuse_existing, store_new
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.setfile import StoredSet

_COPIES = 4
"""Copies of the stacked factors, as float64, that a module's computation holds at most."""
_LITTLE = 0.9
"""Energy below which the report says that the rank is too low."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a combination lost, as a whole and by module."""

    recipe: Recipe
    modules: Mapping[str, Combined]
    warnings: list[str]

    @property
    def rank(self) -> int:
        """The highest rank of a module."""
        return max((one.adapter.rank for one in self.modules.values()), default=0)

    @property
    def loss(self) -> Loss:
        """That of all modules together."""
        return sum((one.loss for one in self.modules.values()), Loss())


@dataclass(frozen=True, slots=True)
class Plan:
    """A combination that has been checked; each module is computed on its own."""

    name: str
    sets: Sequence[StoredSet]
    weights: Sequence[float]
    recipe: Recipe
    modules: Mapping[str, Aligned]
    default_rank: int

    def works(self, progress: Progress) -> list[Callable[[], Combined]]:
        """Return the computation of each module."""
        works = [
            partial(combine.combine, module, adapters, self.weights, self.recipe, self.default_rank)
            for module, adapters in self.modules.items()
        ]
        return progress.follow(works, [1] * len(works))

    def result_bytes(self) -> int:
        """Return the most that the new set takes as float32."""
        return sum(map(self._result_bytes, self.modules.values()))

    def work_bytes(self) -> int:
        """Return the most that the computation of one module takes."""
        return max(map(self._work_bytes, self.modules.values()), default=0)

    def _result_bytes(self, adapters: Aligned) -> int:
        first = present(adapters)[0]
        return 4 * (first.experts or 1) * self._rank(adapters) * (first.d_in + first.d_out)

    def _rank(self, adapters: Aligned) -> int:
        """Return the highest rank that the result of a module can have."""
        stacked = stacked_rank(adapters)
        if self.recipe.is_on_factors:
            return present(adapters)[0].rank
        if self.recipe.is_on_deltas or self.recipe.method == "svd":
            stacked = self.recipe.rank or (
                stacked if self.recipe.energy is not None else self.default_rank
            )
        return max(1, stacked)

    def _work_bytes(self, adapters: Aligned) -> int:
        first = present(adapters)[0]
        width = first.d_in + first.d_out
        columns = 2 * stacked_rank(adapters) + self._rank(adapters)
        blocks = 0
        if self.recipe.method == "knots_ties":  # (R, d_in) of each set
            blocks = 8 * _COPIES * len(adapters) * stacked_rank(adapters) * first.d_in
        if self.recipe.is_on_deltas:
            columns += columns_for(self._rank(adapters), first.d_out, first.d_in)
            blocks = pass_bytes(first.d_out, first.d_in, len(adapters))
        return 8 * _COPIES * (first.experts or 1) * columns * (width + columns) + blocks

    def report(self, combined: Sequence[Combined]) -> Report:
        """Return the report of the computed modules."""
        modules = dict(zip(self.modules, combined, strict=True))
        found = Report(self.recipe, modules, [])
        found.warnings.extend(
            [*_base_warnings(self.sets), *self._missing(), *_loss_warnings(found)]
        )
        return found

    def _missing(self) -> list[str]:
        partly = sum(None in adapters for adapters in self.modules.values())
        text = (
            f"{partly} of {len(self.modules)} modules are not in all sets; a missing one counts as "
            "zero"
        )
        return [text] if partly else []

    def lora_set(self, report: Report) -> BonsaiLoraSet:
        """Return the new set."""
        parameters = adapted_parameters(self._sources())
        names = {name.rpartition(".")[2] for name in report.modules if name not in parameters}
        rank = report.rank
        config = LoraConfig(rank, float(rank), 0.0, tuple(sorted(names)))
        adapters = {module: one.adapter for module, one in report.modules.items()}
        return BonsaiLoraSet(
            LoraRegistry(config).add_all(adapters), self._base_model_name(), self.name
        )

    def _base_model_name(self) -> str:
        return next(filter(None, (one.record.base_model_name for one in self.sets)), "")

    def _sources(self) -> list[tuple[BonsaiLoraSet, Mapping[str, Any] | None]]:
        return [(one.lora_set, one.adapter_config) for one in self.sets]

    def store(self, store: SetView, report: Report) -> StoredSet:
        """Store the new set; raises SetExistsError, MemoryBudgetError and the store's errors."""
        lora_set = self.lora_set(report)
        config = combined_config(lora_set, self._sources())
        wanted = NextVersion(
            lora_set=lora_set, origin="combined", previous=None, adapter_config=config
        )
        return store_new(store, wanted)


def plan(
    store: SetView,
    name: str,
    parts: Sequence[tuple[str, float]],
    recipe: Recipe,
) -> Plan:
    """Check a combination of sets with weights, and return what is to be computed.

    Raises InvalidNameError, SetExistsError, SetNotFoundError, InvalidRequestError,
    ShapeMismatchError if a module has different shapes, UnsupportedAdapterError for DoRA, biases
    and replaced modules, RankTooLargeError, TooManyModulesError, MemoryBudgetError.
    """
    store.check_name(name)
    _check_weights([weight for _, weight in parts], recipe)
    refuse_existing(store, name)
    sets = read_sets(store, [one for one, _ in parts])
    for one in sets:
        _refuse_variants(one)
    modules = align(sets)
    store.limits.check_modules(len(modules))
    adapted_parameters([(one.lora_set, one.adapter_config) for one in sets])
    if recipe.rank is not None:
        store.limits.check_rank(recipe.rank)
    for module, adapters in modules.items():
        store.limits.check_rank(stacked_rank(adapters))
        if recipe.is_on_factors:
            _check_equal_ranks(module, adapters, recipe)
    ranks = [one.rank for adapters in modules.values() for one in present(adapters)]
    made = Plan(name, sets, [weight for _, weight in parts], recipe, modules, max(ranks, default=0))
    store.check_budget(name, made.result_bytes())
    return made


def _check_weights(weights: Sequence[float], recipe: Recipe) -> None:
    if recipe.method != "slerp":
        return
    if len(weights) != 2 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise InvalidRequestError(
            f"slerp has the weights {weights[:8]}; expected two, each 0 or more, and not both 0",
            field="sets",
        )


def _refuse_variants(stored: StoredSet) -> None:
    """Raise UnsupportedAdapterError for a set that is more than scaling * B @ A."""
    adapters = stored.lora_set.registry.adapters
    kinds = {
        "DoRA, whose deltas depend on the base": [
            name for name, one in adapters.items() if one.magnitude is not None
        ],
        "biases": [name for name, one in adapters.items() if one.bias is not None],
        "replaced parameters": [*stored.lora_set.replacements],
    }
    for kind, names in kinds.items():
        if names:
            raise UnsupportedAdapterError(
                f"set {stored.record.name!r} has {kind}, as in {names[0]!r}, which has no sum in "
                "LoRA form; use a set without it",
                set=stored.record.name,
                module=names[0],
            )


def _check_equal_ranks(module: str, adapters: Aligned, recipe: Recipe) -> None:
    ranks = [one.rank for one in present(adapters)]
    if len(set(ranks)) > 1:
        raise InvalidRequestError(
            f"module {module!r} has the ranks {ranks[:8]}, but {recipe.method} needs equal ones, "
            "as it adds A to A and B to B; use exact or svd",
            field="method",
            module=module,
            got=ranks,
        )


def _base_warnings(sets: Sequence[StoredSet]) -> list[str]:
    names = list(dict.fromkeys(filter(None, (one.record.base_model_name for one in sets))))
    if len(names) < 2:
        return []
    text = (
        f"the sets are for different base models ({', '.join(map(repr, names[:8]))}); the new set "
        f"is recorded for {names[0]!r}"
    )
    return [text]


def _loss_warnings(report: Report) -> list[str]:
    recipe, loss = report.recipe, report.loss
    if recipe.method == "linear" and loss.relative_error > 0:
        text = (
            "linear adds A to A and B to B: products of different sets are "
            f"{loss.relative_error:.3g} times the size of the weighted sum; use exact or svd for "
            "the sum itself"
        )
    elif recipe.energy is None and loss.energy_kept < _LITTLE:
        text = (
            f"rank {report.rank} keeps {loss.energy_kept:.1%} of the squared norm of the result; "
            "raise rank to keep more"
        )
    else:
        return []
    return [text]
