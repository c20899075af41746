"""What is left of a set's deltas after the merged weights are stored in few bits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from operator import add
from typing import Literal

import numpy as np

from bonsai_lora.checkpoints.base import Tensor
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.merged_tensor import Touched
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, Floats, to_float32
from bonsai_lora.core.merge import Block, blocks, sampled_rows
from bonsai_lora.errors import InvalidRequestError, counted
from bonsai_lora.formats.dequantize import dequantize
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.quantize import quantize_q8_0
from bonsai_lora.service.jobs import Progress

_BLOCK_VALUES = 1 << 18
_COPIES = 12
"""Copies of a block, as float64, that the computation holds at most."""
SAMPLE_VALUES = 1 << 18
"""Values of a tensor that are computed, as whole rows at equal distances; smaller ones entirely."""


def _q8_0(rows: Floats) -> Floats:
    return dequantize(BY_NAME["Q8_0"], quantize_q8_0(rows)).reshape(rows.shape)


def _q1_0(rows: Floats) -> Floats:
    """Return sign times mean |value| of each 128, as float16."""
    groups = rows.reshape(-1, 128)
    # A sum over the first axis adds one value after the other, as llama.cpp does.
    sums = np.ascontiguousarray(np.abs(groups).T).sum(axis=0) / np.float32(128)
    scale = sums.astype(np.float16).astype(np.float32)[:, None]
    result: Floats = np.where(groups < 0, -scale, scale).reshape(rows.shape)
    return result


def _ternary(width: int, rows: Floats) -> Floats:
    """Return -scale, 0 or scale of each `width` values, where scale is max |value| as float16."""
    groups = rows.reshape(-1, width)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    inverse = np.divide(1, largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.sign(groups) * np.floor(np.abs(groups * inverse) + np.float32(0.5))
    scale = largest.astype(np.float16).astype(np.float32)
    result: Floats = (codes * scale).reshape(rows.shape)
    return result


StoredDtype = Literal["BF16", "F16", "Q8_0", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"]
"""Types whose loss is computed."""

STORED: Mapping[StoredDtype, tuple[int, Callable[[Floats], Floats]]] = {
    "BF16": (1, lambda rows: rows.astype(BFLOAT16).astype(np.float32)),
    "F16": (1, lambda rows: rows.astype(FLOAT16).astype(np.float32)),
    "Q8_0": (32, _q8_0),
    "Q1_0": (128, _q1_0),
    "Q2_0": (64, partial(_ternary, 64)),
    "TQ1_0": (256, partial(_ternary, 256)),
    "TQ2_0": (256, partial(_ternary, 256)),
}
"""By type: the values of a block, and how rows read after they were stored in it."""


@dataclass(frozen=True, slots=True)
class Survival:
    """Sums over the entries of a delta D, and of D' = stored(W + D) - stored(W)."""

    count: int = 0
    same: int = 0
    """Entries with D' = 0."""
    wanted: float = 0.0
    """Sum of D^2."""
    got: float = 0.0
    """Sum of D'^2."""
    product: float = 0.0
    """Sum of D D'."""

    def __add__(self, other: "Survival") -> "Survival":
        """Return the sums over the entries of both."""
        return Survival(*map(add, astuple(self), astuple(other)))

    def times(self, factor: float) -> "Survival":
        """Return the sums as of `factor` times as many entries."""
        return Survival(
            round(self.count * factor),
            round(self.same * factor),
            self.wanted * factor,
            self.got * factor,
            self.product * factor,
        )

    @property
    def unchanged(self) -> float:
        """The share of the entries that are stored as without the delta."""
        return self.same / self.count if self.count else 1.0

    @property
    def gain(self) -> float:
        """<D', D> / |D|^2: 1 if the delta survives, 0 if nothing of it does."""
        return self.product / self.wanted if self.wanted else 1.0

    @property
    def relative_error(self) -> float:
        """|D' - D| / |D|."""
        error = max(0.0, self.got - 2 * self.product + self.wanted)
        return math.sqrt(error / self.wanted) if self.wanted else 0.0


def survive(weights: Floats, delta: Floats, dtype: StoredDtype) -> Survival:
    """Return what is left of `delta` in whole rows (n, width) that are stored in `dtype`."""
    stored = STORED[dtype][1]
    with np.errstate(over="ignore", invalid="ignore"):
        left = (stored(weights + delta) - stored(weights)).astype(np.float64)
    wide = delta.astype(np.float64)
    return Survival(
        delta.size,
        int(np.count_nonzero(left == 0)),
        float(np.vdot(wide, wide)),
        float(np.vdot(left, left)),
        float(np.vdot(left, wide)),
    )


@dataclass(frozen=True, slots=True)
class Followed:
    """The tensors of a merged model whose deltas are followed; each is computed on its own."""

    tensors: Mapping[str, tuple[Tensor, Touched]]
    skipped: Sequence[str]
    """Changed tensors that are not a sum with deltas, or whose rows are not whole blocks."""
    dtype: StoredDtype

    def estimates(self) -> list["partial[Survival]"]:
        """Return the computation of each tensor from a sample of its rows."""
        return [partial(_sample, *one, self.dtype) for one in self.tensors.values()]

    def works(self, progress: Progress) -> list[Callable[[], Survival]]:
        """Return the exact computation of each tensor; it can be stopped before each block."""
        works = [partial(_exact, *one, self.dtype, progress.check) for one in self.tensors.values()]
        return progress.follow(works, [math.prod(one.shape) for one, _ in self.tensors.values()])

    def work_bytes(self) -> int:
        """Return the most that the exact computation of one tensor takes."""
        widest = max(weight.shape[1] for weight, _ in self.tensors.values())
        return _COPIES * 8 * max(_BLOCK_VALUES, widest)


def follow(model: MergedModel, dtype: StoredDtype) -> Followed:
    """Choose the tensors to follow; raises InvalidRequestError if none can be."""
    block = STORED[dtype][0]
    tensors, skipped = {}, []
    for name, touched in model.changes.items():
        weight = model.base.tensor(name)
        if touched.is_sum and len(weight.shape) == 2 and weight.shape[1] % block == 0:
            tensors[name] = weight, touched
        else:
            skipped.append(name)
    if not tensors:
        raise InvalidRequestError(
            "none of the changed tensors is a matrix with an added delta and rows of whole "
            f"{dtype} blocks, which have {counted(block, 'value')}; use another dtype",
            field="dtype",
        )
    return Followed(tensors, skipped, dtype)


def _sample(weight: Tensor, touched: Touched, dtype: StoredDtype) -> Survival:
    """Return the sums of some rows, extended to the whole tensor."""
    rows, columns = weight.shape
    found = Survival()
    distance = rows // max(1, SAMPLE_VALUES // max(1, columns))
    for block in sampled_rows(rows, columns, most=SAMPLE_VALUES, distance=distance):
        found += _of_rows(weight, touched, dtype, block)
    return found.times(rows * columns / found.count) if found.count else found


def _exact(
    weight: Tensor, touched: Touched, dtype: StoredDtype, check: Callable[[], None]
) -> Survival:
    """Return the sums of all rows."""
    found = Survival()
    for block in blocks(*weight.shape, most=_BLOCK_VALUES, whole_rows=True):
        check()
        found += _of_rows(weight, touched, dtype, block)
    return found


def _of_rows(weight: Tensor, touched: Touched, dtype: StoredDtype, block: Block) -> Survival:
    delta = np.zeros((block[0].stop - block[0].start, weight.shape[1]), np.float32)
    for adapter, factor in touched.deltas:
        right, left = adapter.stored_factors_of(*block)
        delta += np.float32(factor * adapter.scaling) * (left @ to_float32(right))
    return survive(to_float32(weight[block]), delta, dtype)
