"""A GGUF LoRA file, computed while it is read: some rows of a factor at a time, any range alone."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from bonsai_lora.core import backend
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, Array, Floats
from bonsai_lora.errors import UnsupportedAdapterError
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_types import TensorType
from bonsai_lora.formats.gguf_writer import Plan
from bonsai_lora.formats.quantize import quantize_q8_0
from bonsai_lora.formats.safetensors import as_bytes

_PIECE_VALUES = 1 << 18
"""Values computed at a time, at least one row: 1 MiB of float32."""

MakeRows = Callable[[slice], Floats]
"""Returns rows of a tensor, counted over all leading dimensions, (n, width)."""

_LARGEST = {"F32": 3.4028234e38, "BF16": 3.3895313e38, "F16": 65504.0, "Q8_0": 127 * 65504.0}
"""Largest finite value of each type."""
_COPIES = 6
"""Float32 copies of a piece: widened, ordered, folded, placed and encoded; and one being sent."""


class LoraFile:
    """A GGUF LoRA file, of which any bytes can be computed."""

    media_type = "application/octet-stream"

    def __init__(
        self, made: Plan, values: Mapping[str, MakeRows], etag: str, *, may_overflow: bool
    ) -> None:
        self.size_bytes = made.total_bytes
        self.etag = etag
        largest = max(_step(one) * one.width for one in made.tensors.values())
        self.working_bytes = _COPIES * 4 * largest
        """Memory for one piece, while it is computed and the one before it is sent."""
        self._may_overflow = may_overflow
        self._plan = made
        self._values = values

    def check_values(self) -> None:
        """Raise UnsupportedAdapterError for values beyond their type; computes all of them."""
        if not self._may_overflow:
            return
        for name, info in self._plan.tensors.items():
            for rows in _blocks(info, 0, _height(info)):
                _check_size(name, info.type, self._values[name](rows))

    def pieces(self, start: int, stop: int) -> Iterator[Callable[[], memoryview]]:
        """Yield what computes the bytes [start, stop), some rows of a tensor at a time."""
        infos = self._plan.tensors
        head = self._plan.head
        if start < len(head):
            yield lambda: memoryview(head)[start:stop]
        bounds = [*(one.start for one in infos.values()), self.size_bytes]
        for (name, info), end in zip(infos.items(), bounds[1:], strict=True):
            if info.start >= stop or end <= start or info.start == info.stop:
                continue
            first = max(0, start - info.start) // info.row_bytes
            last = -(-(min(stop, info.stop) - info.start) // info.row_bytes)
            for rows in _blocks(info, first, last):
                at = info.start + rows.start * info.row_bytes
                yield partial(
                    _encoded, info.type, self._values[name], rows, max(0, start - at), stop - at
                )
            if stop > info.stop and end > info.stop:
                yield partial(_zeros, max(start, info.stop), min(stop, end))


def _height(info: TensorInfo) -> int:
    return math.prod(info.shape[:-1])


def _step(info: TensorInfo) -> int:
    """Return how many rows are computed at a time."""
    return min(_height(info), max(1, _PIECE_VALUES // max(1, info.width)))


def _blocks(info: TensorInfo, first: int, last: int) -> Iterator[slice]:
    step = _step(info)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def _zeros(start: int, stop: int) -> memoryview:
    return memoryview(bytes(stop - start))


def _encoded(kind: TensorType, make: MakeRows, rows: slice, start: int, stop: int) -> memoryview:
    """Return the bytes [start, stop), or to the end, of rows."""
    values = make(rows)
    if kind.name == "F32":
        return as_bytes(values)[start:stop]
    if kind.name == "Q8_0":
        return as_bytes(quantize_q8_0(values.reshape(-1)))[start:stop]
    out: Array = np.empty(values.shape, BFLOAT16 if kind.name == "BF16" else FLOAT16)
    backend.cast(values, out)
    return as_bytes(out)[start:stop]


def _check_size(name: str, kind: TensorType, values: Floats) -> None:
    """Raise UnsupportedAdapterError if a value is beyond the largest of its type."""
    largest = float(max(values.max(initial=0), -values.min(initial=0)))
    if largest > _LARGEST[kind.name]:
        raise UnsupportedAdapterError(
            f"{name} has values up to {largest:.6g}, beyond the largest {kind.name} value; use "
            "dtype=F32, or train with a smaller scaling",
            key=name,
        )
