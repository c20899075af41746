"""Tensors of GGUF files, as the values of a Hugging Face checkpoint and in their own order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from bonsai_lora.checkpoints.file import BaseFile
from bonsai_lora.checkpoints.parts import Values
from bonsai_lora.core.cast import FLOAT32, Floats
from bonsai_lora.core.merge import Block, stacked_rows
from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats import gguf_names
from bonsai_lora.formats.dequantize import dequantize, read_rows
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_names import Change, Heads, Order
from bonsai_lora.formats.hadamard import Folding

MAX_WIDTH = 1 << 19
"""Longest row that is unfolded or reordered: these need whole rows."""
MAX_VECTOR = 1 << 22
"""Most values of a vector or convolution, which are read as a whole."""
MAX_ROWS = 1 << 20
"""Most rows that are reordered, as their order is in memory."""

_row_order = lru_cache(16)(gguf_names.row_order)
_column_order = lru_cache(16)(gguf_names.column_order)


@lru_cache(16)
def _places_of_rows(change: Change, heads: Heads, rows: int) -> Order | None:
    """Return the row in GGUF of each row of the checkpoint; None if all rows stay."""
    order = _row_order(change, heads, rows)
    return None if order is None else np.argsort(order)


ReadRows = Callable[[int, int], Floats]


@dataclass(frozen=True, slots=True)
class Conversion:
    """How a tensor's values differ between a Hugging Face checkpoint and a GGUF file."""

    change: Change = Change.NONE
    heads: Heads = field(default_factory=Heads)
    has_columns: bool = True
    """Whether the columns are in GGUF's order, as `change` says."""

    def rows(self, count: int) -> Order | None:
        """Return `order` such that row i in GGUF is row order[i] of the checkpoint."""
        return _row_order(self.change, self.heads, count)

    def places(self, count: int) -> Order | None:
        """Return the reverse: row i of the checkpoint is row places[i] in GGUF."""
        return _places_of_rows(self.change, self.heads, count)

    def columns(self, count: int) -> Order | None:
        """Return the same as `rows` for columns."""
        return _column_order(self.change, self.heads, count) if self.has_columns else None

    def check(self, rows: int, columns: int) -> None:
        """Raise UnsupportedGgufError if the heads do not fit, or an order would be too long."""
        if self.change not in (Change.NONE, Change.PLUS_ONE):
            if rows > MAX_ROWS:
                raise _too_long("reordered tensors", rows, MAX_ROWS, "rows")
            if columns > MAX_WIDTH:
                raise _too_long("reordered rows", columns, MAX_WIDTH)
            self.rows(rows)
            self.columns(columns)


@dataclass(frozen=True, eq=False, slots=True)
class GgufTensor:
    """A tensor of a GGUF file, with the values that it has in a Hugging Face checkpoint."""

    file: BaseFile
    info: TensorInfo
    shape: tuple[int, ...]
    """In a checkpoint: for a stack of experts that of one expert."""
    conversion: Conversion
    folding: Folding | None = None
    """How this tensor is folded; None if it is not."""
    first_row: int = 0
    """Row of the file's tensor at which this one starts."""
    is_matrix: bool = True
    """Whether rows can be read alone; all others are read as a whole."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values that are read, float32."""
        return FLOAT32

    def check(self) -> None:
        """Raise UnsupportedGgufError for what cannot be read, before any of it is."""
        width = self.info.width
        if self.folding is not None and width > MAX_WIDTH:
            raise _too_long("folded rows", width, MAX_WIDTH)
        if not self.is_matrix and prod(self.info.shape) > MAX_VECTOR:
            raise _too_long("vectors", prod(self.info.shape), MAX_VECTOR)
        self.conversion.check(self.shape[0] if self.shape else 1, width)

    def as_matrix(self, rows: int) -> "GgufTensor":
        """Return the same values as a matrix of `rows` rows."""
        return replace(self, shape=(rows, prod(self.shape) // max(rows, 1)))

    def __getitem__(self, block: Block) -> Floats:
        """Return a copy of a block of a matrix; raises BaseChangedError.

        `check` must have passed.
        """
        rows, columns = block
        if not self.is_matrix:
            return np.array(self._whole().reshape(self.shape)[block])
        height, width = self.shape
        places = self._stored_places(height, rows)
        if columns.stop - columns.start < width:
            return self._part_of_row(int(places[0]), columns)
        values = gathered(self._stored_rows, places)
        order = self.conversion.columns(width)
        return values if order is None else np.ascontiguousarray(values[:, np.argsort(order)])

    def _stored_places(self, height: int, rows: slice) -> Order:
        """Return the rows of the file that are the rows `rows` of a checkpoint."""
        places = self.conversion.places(height)
        return np.arange(rows.start, rows.stop) if places is None else places[rows]

    def _stored_rows(self, first: int, last: int) -> Floats:
        start = self.first_row
        values = read_rows(self.file.read_at, self.info, start + first, start + last)
        return values if self.folding is None else self.folding.unfold(values)

    def _part_of_row(self, row: int, columns: slice) -> Floats:
        assert self.folding is None
        kind = self.info.type
        start = self.info.start + (self.first_row + row) * self.info.row_bytes
        raw = self.file.read(
            start + kind.bytes_of(columns.start), start + kind.bytes_of(columns.stop)
        )
        return dequantize(kind, raw).reshape(1, -1)

    def _whole(self) -> Floats:
        """Return a vector or convolution as in a checkpoint."""
        rows = prod(self.info.shape) // max(1, self.info.width)
        values = read_rows(self.file.read_at, self.info, 0, rows).reshape(self.info.shape)
        places = self.conversion.places(len(values))
        if places is not None:
            values = values[places]
        match self.conversion.change:
            case Change.PLUS_ONE:
                return values - np.float32(1)
            case Change.DECAY:
                with np.errstate(all="ignore"):  # values of untrusted files
                    return np.log(-values)
        return values


@dataclass(frozen=True, eq=False, slots=True)
class InGgufOrder:
    """Values of a checkpoint in the order and form in which a GGUF file has them."""

    source: Values
    conversion: Conversion
    hugging_face_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, those of the source."""
        return self.source.shape

    def __getitem__(self, block: Block) -> Floats:
        """Return the values of a block."""
        if len(self.hugging_face_shape) != 2:
            return np.array(self._whole().reshape(self.shape)[block])
        rows, columns = block
        height, width = self.shape
        order, column_order = self.conversion.rows(height), self.conversion.columns(width)
        if order is None and column_order is None:
            values: Floats = self.source[block]
            return values
        places = np.arange(rows.start, rows.stop) if order is None else order[rows]
        found = gathered(lambda first, last: self.source[slice(first, last), columns], places)
        return found if column_order is None else np.ascontiguousarray(found[:, column_order])

    def _whole(self) -> Floats:
        values: Floats = self.source[slice(0, self.shape[0]), slice(0, self.shape[1])]
        values = values.reshape(self.hugging_face_shape)
        order = self.conversion.rows(len(values))
        if order is not None:
            values = values[order]
        match self.conversion.change:
            case Change.PLUS_ONE:
                return values + np.float32(1)
            case Change.DECAY:
                with np.errstate(all="ignore"):
                    return -np.exp(values)
        return values


@dataclass(frozen=True, eq=False, slots=True)
class Stacked:
    """Matrices of the same shape, one below the other."""

    parts: Sequence[Values]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        height, width = self.parts[0].shape
        return len(self.parts) * height, width

    def __getitem__(self, block: Block) -> Floats:
        """Return the values of a block."""
        rows, columns = block
        height = self.parts[0].shape[0]
        found = [
            self.parts[number][inside, columns] for number, inside in stacked_rows(rows, height)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)


def gathered(read: ReadRows, places: Order) -> Floats:
    """Return the rows at `places` (n,), read in runs of neighbors.

    Runs include single rows that are not wanted: rotated heads interleave two halves.
    """
    if len(places) == 0 or (np.diff(places) == 1).all():
        first = int(places[0]) if len(places) else 0
        return read(first, first + len(places))
    out: Floats | None = None
    order = np.argsort(places)
    runs = np.split(order, np.flatnonzero(np.diff(places[order]) > 2) + 1)
    for run in runs:
        first, last = int(places[run[0]]), int(places[run[-1]]) + 1
        values = read(first, last)
        if out is None:
            out = np.empty((len(places), values.shape[1]), np.float32)
        out[run] = values[places[run] - first]
    assert out is not None
    return out


def _too_long(what: str, got: int, most: int, units: str = "values") -> UnsupportedGgufError:
    return UnsupportedGgufError(
        f"{what} of {got} {units} are longer than the {most} that are supported; use a file with "
        "plain weights",
        got=got,
    )
