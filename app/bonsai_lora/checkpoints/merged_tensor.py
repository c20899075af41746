"""One tensor of a merged model, computed block by block."""

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bonsai_lora.checkpoints.base import Tensor, row_norms
from bonsai_lora.core import backend
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array, to_float32
from bonsai_lora.core.merge import Block, merge_rows, stacked_rows


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """Replaced rows of an embedding (trainable_token_indices)."""

    numbers: np.ndarray[tuple[int], np.dtype[np.intp]]
    """Row numbers, (n,)."""
    values: Array
    """New values, (n, width)."""


@dataclass(eq=False, slots=True)
class Touched:
    """The changes to one tensor of the base."""

    deltas: list[tuple[LoraAdapter, float]] = field(default_factory=list)
    """Adapters in the orientation of the base, and their weights."""
    biases: list[tuple[LoraAdapter, float]] = field(default_factory=list)
    replacement: Array | None = None
    rows: TokenRows | None = None

    @property
    def is_sum(self) -> bool:
        """Whether the only changes are added deltas."""
        return (
            bool(self.deltas)
            and not self.biases
            and self.replacement is None
            and self.rows is None
            and all(one.magnitude is None and one.experts is None for one, _ in self.deltas)
        )


class MergedTensor:
    """A changed tensor, computed from the base values block by block."""

    def __init__(self, base: Tensor, touched: Touched) -> None:
        is_stacked = any(one.experts is not None for one, _ in touched.deltas)
        rows = math.prod(base.shape[:-1]) if len(base.shape) == 2 or is_stacked else 1
        self._base = base.as_matrix(rows)
        self._touched = touched
        self._dtype = np.float64 if base.dtype == np.float64 else np.float32
        self._ratio: Array | None = None
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self._base.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the merged values, that of the base."""
        return self._base.dtype

    def __getitem__(self, block: Block) -> Array:
        """Return the merged values of a block, rounded once to the dtype of the base."""
        deltas = self._touched.deltas
        if len(deltas) == 1 and self._touched.is_sum and self._dtype is np.float32:
            only, weight = deltas[0]
            values = self._base[block]
            factors = only.stored_factors_of(*block)
            merge_rows(values, *factors, _scaled(only, weight), out=values)
            return values
        total = self._start(block)
        with np.errstate(over="ignore", invalid="ignore"):
            for adapter, weight in deltas:
                self._add(total, adapter, weight, block)
            for adapter, weight in self._touched.biases:
                assert adapter.bias is not None
                bias: Array = np.asarray(adapter.bias, self._dtype)
                total += bias[block[1]] * _scaled(adapter, weight)
        if self._dtype is np.float64:
            return total
        out: Array = np.empty(total.shape, self._base.dtype)
        backend.cast(total, out)
        return out

    def _start(self, block: Block) -> Array:
        replacement = self._touched.replacement
        source = self._base if replacement is None else replacement.reshape(self._base.shape)
        values = np.ascontiguousarray(source[block])
        if self._dtype is np.float64:
            total: Array = values.astype(np.float64)
        else:
            total = to_float32(values, out=np.empty(values.shape, np.float32))
        if self._touched.rows is not None:
            _put_rows(total, self._touched.rows, block)
        return total

    def _add(self, total: Array, adapter: LoraAdapter, weight: float, block: Block) -> None:
        rows, columns = block
        if adapter.experts is not None:
            height = self._base.shape[0] // adapter.experts
            rest = total
            for number, inside in stacked_rows(rows, height):
                part, rest = np.split(rest, [inside.stop - inside.start])
                self._add(part, adapter.each_expert[number], weight, (inside, columns))
            return
        right, left = adapter.stored_factors_of(rows, columns)
        scaling = _scaled(adapter, weight)
        merge_rows(total, right, left, scaling, out=total)
        if adapter.magnitude is not None:
            ratio = self._dora_ratio(adapter).astype(self._dtype)
            total *= ratio[rows, None] if adapter.layer == "linear" else ratio[None, columns]

    def _dora_ratio(self, adapter: LoraAdapter) -> Array:
        """Return m / norm (d_out,), computed from whole rows once per tensor."""
        with self._lock:
            if self._ratio is None:
                assert adapter.magnitude is not None
                source = self._touched.replacement
                norms = row_norms(self._base if source is None else source, adapter)
                self._ratio = to_float32(adapter.magnitude) / norms
            return self._ratio


def _scaled(adapter: LoraAdapter, weight: float) -> float:
    return adapter.scaling if weight == 1.0 else adapter.scaling * weight


def _put_rows(total: Array, rows: TokenRows, block: Block) -> None:
    """Write the values of `rows` that are in `block` to `total`."""
    here = (rows.numbers >= block[0].start) & (rows.numbers < block[0].stop)
    values = np.ascontiguousarray(rows.values[here][:, block[1]])
    total[rows.numbers[here] - block[0].start] = values.astype(total.dtype)
