"""Compare sets: norms, cosines and interference, whole and by module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bonsai_lora.core.similarity import Similarity, joint, similarity, subspace_similarity
from bonsai_lora.service.aligned import Aligned, align, present, read_sets, stacked_rank
from bonsai_lora.service.jobs import Progress
from bonsai_lora.service.limits import FIGURE_BYTES
from bonsai_lora.service.view import SetView

_NANOSECONDS_PER_OPERATION = 0.02
"""Of a product of float64 matrices, on one core."""


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

    def works(self, progress: Progress) -> list[Callable[[], ModuleComparison]]:
        """Return the computation of each module."""
        works = [partial(_compare, adapters) for adapters in self.modules.values()]
        return progress.follow(works, self._operations())

    def work_bytes(self) -> int:
        """Return the most that the computation of one module takes: its factors as float64."""
        return max(map(_work_bytes, self.modules.values()), default=0)

    def figures(self) -> int:
        """Return how many numbers the result has at most."""
        return (len(self.modules) + 1) * (len(self.names) + 1) ** 2

    def result_bytes(self) -> int:
        """Return the most that the result takes, also as JSON."""
        return FIGURE_BYTES * self.figures()

    def _operations(self) -> list[int]:
        """Return the multiplications and additions that each module takes."""
        return [_operations(adapters) for adapters in self.modules.values()]

    def nanoseconds(self) -> float:
        """Estimate the processor time of all modules."""
        return _NANOSECONDS_PER_OPERATION * sum(self._operations())

    def whole(self, modules: Sequence[ModuleComparison]) -> Similarity:
        """Return the similarity of the sets over all modules."""
        return joint((one.similarity for one in modules), len(self.names))


def compare(store: SetView, names: Sequence[str]) -> Comparison:
    """Check sets that are to be compared.

    Raises SetNotFoundError, ShapeMismatchError if a module has different shapes, and
    AnswerTooLargeError.
    """
    comparison = Comparison(names, align(read_sets(store, names)))
    store.limits.check_answer(comparison.figures())
    return comparison


def _work_bytes(adapters: Aligned) -> int:
    one, rank = present(adapters)[0], stacked_rank(adapters)
    return 8 * (2 * (one.d_in + one.d_out) * rank + 3 * rank * rank)


def _operations(adapters: Aligned) -> int:
    one = present(adapters)[0]
    return 2 * stacked_rank(adapters) ** 2 * (one.d_in + one.d_out) * (one.experts or 1)


def _compare(adapters: Aligned) -> ModuleComparison:
    pair = present(adapters)
    is_pair = len(adapters) == len(pair) == 2
    return ModuleComparison(similarity(adapters), subspace_similarity(*pair) if is_pair else None)
