"""The difference of a tensor in two checkpoints, which need not fit in memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bonsai_lora.checkpoints.base import Tensor
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.core.merge import blocks

HELD_VALUES = 1 << 26
"""Most values of a difference that is held as float32 (256 MiB), so that both files are read once;
a larger one is computed again for each pass."""

_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class Survey:
    """What reading a difference once finds; squares of Frobenius norms."""

    square: float
    base_square: float
    changed_rows: npt.NDArray[np.intp]
    """Numbers of the rows that are not zero."""


class Difference:
    """tuned - base as float32, in blocks of whole rows; a vector is one row, a stack a tall matrix.

    `check` is called before each block, and may raise.
    """

    def __init__(self, base: Tensor, tuned: Tensor, check: Callable[[], None]) -> None:
        rows = math.prod(base.shape[:-1])
        self._base, self._tuned = base.as_matrix(rows), tuned.as_matrix(rows)
        self._check = check
        self._held: Floats | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self._base.shape
        return rows, columns

    @property
    def work_bytes(self) -> int:
        """The most memory that blocks take, and the whole difference if it is held."""
        rows, columns = self.shape
        held = 4 * rows * columns if rows * columns <= HELD_VALUES else 0
        return held + 6 * 8 * max(_BLOCK_VALUES, columns)

    def survey(self) -> Survey:
        """Read both tensors once, and hold the difference if it is small enough."""
        rows, columns = self.shape
        held = np.empty(self.shape, np.float32) if rows * columns <= HELD_VALUES else None
        square = base_square = 0.0
        is_changed = np.zeros(rows, np.bool_)
        for place, base, delta in self._read():
            square += _square(delta)
            base_square += _square(base)
            is_changed[place] = delta.any(axis=1)
            if held is not None:
                held[place] = delta
        self._held = held
        return Survey(square, base_square, np.flatnonzero(is_changed))

    def blocks(self) -> Iterator[Floats]:
        """Yield the row blocks, from the first to the last."""
        if self._held is None:
            yield from (delta for _, _, delta in self._read())
            return
        for place, _ in blocks(*self.shape, most=_BLOCK_VALUES, whole_rows=True):
            self._check()
            yield self._held[place]

    def tuned_rows(self, numbers: npt.NDArray[np.intp]) -> Array:
        """Return rows (n, columns) of the tuned tensor, as stored."""
        columns = slice(0, self.shape[1])
        found = np.empty((len(numbers), self.shape[1]), self._tuned.dtype)
        for place, number in enumerate(numbers.tolist()):
            found[place] = self._tuned[slice(number, number + 1), columns][0]
        return found

    def _read(self) -> Iterator[tuple[slice, Floats, Floats]]:
        for place in blocks(*self.shape, most=_BLOCK_VALUES, whole_rows=True):
            self._check()
            base, tuned = self._base[place], self._tuned[place]
            narrow = to_float32(base)
            if 8 in (tuned.dtype.itemsize, base.dtype.itemsize):
                wide: Any = tuned.astype(np.float64) - base.astype(np.float64)
                yield place[0], narrow, wide.astype(np.float32)
            else:
                yield place[0], narrow, to_float32(tuned) - narrow


def _square(values: Floats) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))
