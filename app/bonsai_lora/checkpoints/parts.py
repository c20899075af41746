"""Files that are put together from parts while they are read, any byte range alone.

Computed parts consist of fixed blocks, so that a range is always the same slice of the whole file.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import numpy as np

from bonsai_lora.checkpoints.file import BaseFile
from bonsai_lora.core import backend
from bonsai_lora.core.cast import Array
from bonsai_lora.core.merge import BLOCK_VALUES, Block, blocks
from bonsai_lora.formats.dtypes import FLOAT_DTYPES
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.gguf_writer import Plan
from bonsai_lora.formats.quantize import quantize_q8_0
from bonsai_lora.formats.safetensors import as_bytes

PIECE_BYTES = 1 << 20
"""Length of the pieces in which stored bytes are sent."""

Piece = Callable[[], memoryview]
"""Reads or computes a part of a file; callable in any thread. Raises BaseChangedError."""


class Values(Protocol):
    """A matrix that is read or computed block by block."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    def __getitem__(self, block: Block) -> Any:
        """Return the values of a block."""


class Part(Protocol):
    """Consecutive bytes of a file."""

    @property
    def size_bytes(self) -> int:
        """Length."""

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of the bytes [start, stop), in order."""


@dataclass(frozen=True, eq=False, slots=True)
class Made:
    """Bytes that are made again for each request, so that they take no memory in between."""

    size_bytes: int
    make: Callable[[], bytes]

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of the bytes [start, stop), in order."""
        yield lambda: memoryview(self.make())[start:stop]


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """The bytes [first, last) of a file of the base."""

    file: BaseFile
    first: int
    last: int

    @property
    def size_bytes(self) -> int:
        """Length."""
        return self.last - self.first

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of the bytes [start, stop), in order."""
        end = self.first + stop
        for offset in range(self.first + start, end, PIECE_BYTES):
            yield partial(self.file.read, offset, min(offset + PIECE_BYTES, end))


@dataclass(frozen=True, eq=False, slots=True)
class Computed:
    """A tensor, computed block by block and encoded."""

    values: Values
    bytes_of: Callable[[int], int]
    """Length of a number of values."""
    encode: Callable[[Array], memoryview] = as_bytes

    @property
    def size_bytes(self) -> int:
        """Length."""
        return self.bytes_of(prod(self.values.shape))

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of the bytes [start, stop), cut from the fixed blocks."""
        offset = 0
        rows, columns = self.values.shape
        for block in blocks(rows, columns, most=BLOCK_VALUES):
            size = self.bytes_of(
                (block[0].stop - block[0].start) * (block[1].stop - block[1].start)
            )
            first, last = max(start, offset), min(stop, offset + size)
            if first < last:
                yield partial(self._compute, block, first - offset, last - offset)
            offset += size
            if offset >= stop:
                return

    def _compute(self, block: Block, first: int, last: int) -> memoryview:
        return self.encode(self.values[block])[first:last]


def computed_as(dtype: str, values: Values) -> Computed:
    """Return float32 values as a part of a file: F32, F16, BF16 or Q8_0."""
    return Computed(values, BY_NAME[dtype].bytes_of, _ENCODERS[dtype])


def _rounded(dtype: str) -> Callable[[Array], memoryview]:
    def encode(values: Array) -> memoryview:
        out: Array = np.empty(values.shape, FLOAT_DTYPES[dtype])
        backend.cast(values, out)
        return as_bytes(out)

    return encode


def _q8_0(values: Array) -> memoryview:
    return as_bytes(quantize_q8_0(values))


_ENCODERS = {"F32": as_bytes, "F16": _rounded("F16"), "BF16": _rounded("BF16"), "Q8_0": _q8_0}


def digest_of(seed: str) -> str:
    """Return 40 hexadecimal digits, as of a Git commit, that differ wherever `seed` does."""
    return hashlib.sha256(seed.encode()).hexdigest()[:40]


def etag_of(seed: str) -> str:
    """Return a strong ETag that differs wherever `seed` does.

    Hub clients name cached files by it, whence its length, so seeds must differ between files.
    """
    return f'"{digest_of(seed)}"'


def media_type_of(name: str) -> str:
    """Return the Content-Type of a model's file."""
    return "application/json" if name.endswith(".json") else "application/octet-stream"


def gguf_parts(
    planned: Plan, make_head: Callable[[], bytes], part_of: Callable[[str, TensorInfo], Part]
) -> list[Part]:
    """Return the header of a GGUF file, and the part of each tensor, with zeros in between."""
    parts: list[Part] = [Made(len(planned.head), make_head)]
    position = len(planned.head)
    for name, info in planned.tensors.items():
        parts += [_zeros(info.start - position), part_of(name, info)]
        position = info.stop
    return [*parts, _zeros(planned.total_bytes - position)]


def _zeros(size: int) -> Part:
    return Made(size, lambda: bytes(size))


class MergedFile:
    """One file of a merged model, or a GGUF LoRA: its size, its ETag, any range of its bytes."""

    def __init__(self, parts: Sequence[Part], etag: str, media_type: str) -> None:
        self.media_type = media_type
        self.etag = etag
        self._parts = parts

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(one.size_bytes for one in self._parts)]

    @property
    def size_bytes(self) -> int:
        """Length."""
        return self._starts[-1]

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of the bytes [start, stop), in order."""
        starts = self._starts
        for number in range(bisect_right(starts, start) - 1, len(self._parts)):
            first, last = max(start, starts[number]), min(stop, starts[number + 1])
            if starts[number] >= stop:
                return
            if first < last:
                yield from self._parts[number].pieces(first - starts[number], last - starts[number])
