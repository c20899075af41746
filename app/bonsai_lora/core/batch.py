"""One batch whose rows go through different adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import FLOAT32, Floats

Rows = slice | npt.NDArray[np.intp]
"""Rows of a batch: a slice if they are consecutive, otherwise their numbers in ascending order."""


Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """The rows of a batch that one adapter applies to, and their weights."""

    adapter: LoraAdapter
    rows: Rows
    weights: float | Floats
    """Factor on what the adapter adds: one for all rows, or one per row (n,)."""
    base_outputs: Floats | None = None
    """W x of the whole batch (rows, d_out), for DoRA."""
    row_norms: Floats | None = None
    """(d_out,), for DoRA."""

    def apply(self, x: Floats) -> Floats:
        """Return what the adapter adds for its rows of the batch x (rows, d_in)."""
        if self.base_outputs is None or self.row_norms is None:
            return self.adapter.apply(x[self.rows], self.weights)
        return self.adapter.apply_dora(x[self.rows], self.base_outputs[self.rows], self.row_norms)


def expert_segments(
    adapter: LoraAdapter, rows: Rows, weights: float | Floats, experts: Integers
) -> list[Segment]:
    """Split `rows` into one segment per expert in use.

    `experts` (n,) is the number of the expert, 0 to E - 1, of each row of the whole batch.
    """
    numbers = np.arange(len(experts))[rows]
    order = np.argsort(experts[numbers], kind="stable")
    used, starts = np.unique(experts[numbers][order], return_index=True)
    return [
        Segment(
            adapter.each_expert[expert],
            numbers[part],
            weights[part] if isinstance(weights, np.ndarray) else weights,
        )
        for expert, part in zip(used, np.split(order, starts)[1:], strict=True)
    ]


def rows_of(numbers: Sequence[int]) -> Rows:
    """Return ascending row numbers, as a slice if they are consecutive."""
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return np.array(numbers, np.intp)


def apply_segments(x: Floats, segments: Sequence[Segment], d_out: int) -> Floats:
    """Return the sum of what all segments add for their rows, (n, d_in) -> (n, d_out) float32.

    A row in no segment gets zeros; one in several gets their sum, in the order of `segments`.
    Each segment costs one read of its adapter and `2 rows r (d_in + d_out)` operations; nothing is
    padded (as in BGMV and SGMV of Punica, Chen et al. 2023).
    """
    outputs = np.zeros((len(x), d_out), FLOAT32)
    written = np.zeros(len(x), np.bool_)
    for segment in segments:
        rows = segment.rows
        delta = segment.apply(x)
        if written[rows].any():
            outputs[rows] += delta
        else:
            outputs[rows] = delta
        written[rows] = True
    return outputs
