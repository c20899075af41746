"""Singular values of a set's deltas, module by module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.factors import Values
from bonsai_lora.core.spectrum import singular_values
from bonsai_lora.service.jobs import Progress
from bonsai_lora.service.limits import FIGURE_BYTES

_FIGURES = 8
"""Numbers of a module beside its singular values."""
_NANOSECONDS_PER_OPERATION = 0.1
"""Of a QR decomposition of thin float64 matrices, on one core."""


@dataclass(frozen=True, slots=True)
class Spectra:
    """Adapters whose singular values are wanted; each is computed on its own."""

    adapters: Mapping[str, LoraAdapter]

    def works(self, progress: Progress) -> list[Callable[[], Values]]:
        """Return the computation of each module, whose result its adapter remembers."""
        works = [partial(singular_values, one) for one in self.adapters.values()]
        return progress.follow(works, self._operations())

    def result_bytes(self) -> int:
        """Return the most that the result takes, also as JSON."""
        figures = [len(one.a_matrix) + _FIGURES for one in self.adapters.values()]
        return FIGURE_BYTES * sum(figures)

    def _operations(self) -> list[int]:
        """Return the multiplications and additions that each module takes."""
        return [2 * one.rank * _numbers(one) for one in self.adapters.values()]

    def nanoseconds(self) -> float:
        """Estimate the processor time of all modules."""
        return _NANOSECONDS_PER_OPERATION * sum(self._operations())

    def work_bytes(self) -> int:
        """Return the most that one module takes: its factors as float64, twice."""
        return max((16 * _numbers(one) for one in self.adapters.values()), default=0)


def _numbers(adapter: LoraAdapter) -> int:
    """Return how many numbers A and B have."""
    return adapter.rank * (adapter.d_in + adapter.d_out) * (adapter.experts or 1)
