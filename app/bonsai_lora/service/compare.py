"""Compare sets: norms, cosines and interference, whole and by module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bonsai_lora.core.similarity import Similarity, joint, similarity, subspace_similarity
from bonsai_lora.service.aligned import Aligned, align, read_sets
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.view import SetView


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """The deltas of one module."""

    similarity: Similarity
    subspace_similarity: float | None
    """Of two sets that both have the module."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sets that have been checked; each module is computed on its own."""

    names: Sequence[str]
    modules: Mapping[str, Aligned]

    def works(self) -> list["partial[ModuleComparison]"]:
        """Return the computation of each module."""
        return [partial(_compare, adapters) for adapters in self.modules.values()]

    def work_bytes(self) -> int:
        """Return the most that the computation of one module takes: its factors as float64."""
        return max(
            (
                8 * (2 * (one.d_in + one.d_out) * rank + 3 * rank * rank)
                for adapters in self.modules.values()
                for one in [next(one for one in adapters if one is not None)]
                for rank in [sum(one.rank for one in adapters if one is not None)]
            ),
            default=0,
        )

    def whole(self, modules: Sequence[ModuleComparison]) -> Similarity:
        """Return the similarity of the sets over all modules."""
        return joint((one.similarity for one in modules), len(self.names))


def compare(store: SetView, limits: Limits, names: Sequence[str]) -> Comparison:
    """Check sets that are to be compared.

    Raises SetNotFoundError, ShapeMismatchError if a module has different shapes, and
    AnswerTooLargeError.
    """
    modules = align(read_sets(store, names))
    limits.check_answer((len(modules) + 1) * (len(names) + 1) ** 2)
    return Comparison(names, modules)


def _compare(adapters: Aligned) -> ModuleComparison:
    present = [one for one in adapters if one is not None]
    is_pair = len(adapters) == len(present) == 2
    return ModuleComparison(
        similarity(adapters), subspace_similarity(*present) if is_pair else None
    )
