"""Where the tensors of a GGUF file start, and which of three layouts type 42 has in it.

llama.cpp requires each offset to be the padded sum of the sizes before it (ggml/src/gguf.cpp), so
the offsets tell blocks of 64 from blocks of 128 elements. Whether the scale of a block of 128 comes
first or last is seen from the blocks: a scale is finite, not negative and below 2, and quantizers
of ternary models never produce code 3.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bonsai_lora.errors import MalformedGgufError, UnsupportedGgufError
from bonsai_lora.formats.gguf_types import Q2_0_G128, TQ2_0_G128, TYPES, TensorType
from bonsai_lora.formats.gguf_values import ReadAt, malformed, read_exactly

AMBIGUOUS_ID = 42

_SAMPLED_TENSORS = 16
_SAMPLED_BLOCKS = 64
"""Type 42 is decided by the first blocks of this many tensors."""
_LARGEST_SCALE = 2.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the file describes it."""

    name: str
    shape: tuple[int, ...]
    """As in NumPy: the last dimension is contiguous."""
    type_id: int
    offset: int
    """From the start of the data."""

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type and shape of a tensor, and its byte range [start, stop) in the file."""

    type: TensorType
    shape: tuple[int, ...]
    """As in NumPy: the last dimension is contiguous."""
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Elements of a row, the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.type.bytes_of(self.width)


def padded(size: int, alignment: int) -> int:
    """Return `size` rounded up to a multiple of `alignment`, a power of two."""
    return (size + alignment - 1) & -alignment


def place(
    entries: Sequence[Entry],
    data_start: int,
    data_bytes: int,
    alignment: int,
    read: ReadAt,
    *,
    scale_is_last: bool = False,
) -> dict[str, TensorInfo]:
    """Return the tensors, in file order.

    `scale_is_last` is a known sign of TQ2_0_G128; without it the contents decide. Raises
    MalformedGgufError for offsets or sizes that do not fit the file, UnsupportedGgufError if blocks
    of type 42 fit no known layout.
    """
    kinds = _fitting(entries, data_bytes, alignment)
    if Q2_0_G128 in kinds:
        kinds.append(TQ2_0_G128)
        if scale_is_last:
            return _placed(entries, data_start, TQ2_0_G128)
    layouts = [_placed(entries, data_start, kind) for kind in kinds]
    if len(kinds) == 1:
        return layouts[0]
    shares = [
        _plausible_share(kind, layout.values(), read)
        for kind, layout in zip(kinds, layouts, strict=True)
    ]
    if max(shares) < 0.5:
        found = ", ".join(
            f"{one.name} {share:.0%}" for one, share in zip(kinds, shares, strict=True)
        )
        raise UnsupportedGgufError(
            f"type {AMBIGUOUS_ID} has blocks of no known layout; valid as {found}; use a file with "
            "Q2_0 in blocks of 64"
        )
    return layouts[shares.index(max(shares))]


def _placed(
    entries: Sequence[Entry], data_start: int, type_42: TensorType
) -> dict[str, TensorInfo]:
    found = {}
    for one in entries:
        kind = type_42 if one.type_id == AMBIGUOUS_ID else TYPES[one.type_id]
        start = data_start + one.offset
        size = kind.bytes_of(math.prod(one.shape))
        found[one.name] = TensorInfo(kind, one.shape, start, start + size)
    return found


def _fitting(entries: Sequence[Entry], data_bytes: int, alignment: int) -> list[TensorType]:
    """Return what type 42 may be by the offsets: Q2_0, Q2_0_G128, or both in tiny files.

    Types whose sizes also give the end of the file are preferred.
    """
    q2_0 = TYPES[AMBIGUOUS_ID]
    if not any(one.type_id == AMBIGUOUS_ID for one in entries):
        _replay(entries, q2_0, alignment, data_bytes)
        return [q2_0]
    loose: list[TensorType] = []
    faults: list[MalformedGgufError] = []
    for gap in dict.fromkeys((alignment, 1)):  # early versions of OxiBonsai did not pad
        exact: list[TensorType] = []
        for kind in (q2_0, Q2_0_G128):
            try:
                end = _replay(entries, kind, gap, data_bytes)
            except MalformedGgufError as fault:
                faults.append(fault)
            else:
                (exact if data_bytes <= padded(end, alignment) else loose).append(kind)
        if exact:
            return exact
    if not loose:
        raise faults[0]
    return loose[:1]


def _replay(entries: Sequence[Entry], type_42: TensorType, alignment: int, data_bytes: int) -> int:
    """Return where the last tensor ends, counted from the start of the data."""
    expected = end = 0
    for one in entries:
        kind = type_42 if one.type_id == AMBIGUOUS_ID else TYPES[one.type_id]
        if one.width % kind.block:
            raise malformed(
                f"tensor {one.name!r} has rows of {one.width} elements, not a multiple of the "
                f"{kind.block} in a block of {kind.name}"
            )
        if one.offset != expected:
            kind_of_fault = "overlaps the previous one" if one.offset < expected else "leaves a gap"
            raise malformed(
                f"tensor {one.name!r} starts at {one.offset}, not {expected}: it {kind_of_fault}"
            )
        end = expected + kind.bytes_of(math.prod(one.shape))
        expected = padded(end, alignment)
        if end > data_bytes:
            raise malformed(
                f"tensor {one.name!r} ends {end} bytes into the data, of which the file has "
                f"{data_bytes}"
            )
    return end


def _plausible_share(kind: TensorType, tensors: Iterable[TensorInfo], read: ReadAt) -> float:
    """Return which share of some blocks has a possible scale, and no code 3, as this type."""
    found = [one for one in tensors if one.type is kind and one.stop > one.start]
    step = max(1, len(found) // _SAMPLED_TENSORS)
    plausible = total = 0
    for one in found[::step][:_SAMPLED_TENSORS]:
        size = min(one.stop - one.start, _SAMPLED_BLOCKS * kind.size)
        raw = read_exactly(read, one.start, size, "a tensor")
        blocks = np.frombuffer(raw, np.uint8).reshape(-1, kind.size)
        if kind is TQ2_0_G128:
            blocks = np.roll(blocks, 2, axis=1)
        plausible += _count_plausible(blocks[:, :2], blocks[:, 2:])
        total += len(blocks)
    return plausible / total if total else 1.0


def _count_plausible(scales: npt.NDArray[np.uint8], codes: npt.NDArray[np.uint8]) -> int:
    scale = np.ascontiguousarray(scales).view("<f2")[:, 0]
    is_scale = (scale >= 0) & (scale < _LARGEST_SCALE)  # NaN is neither
    is_ternary = ~(codes & (codes >> 1) & 0x55).any(axis=1)
    return int(np.count_nonzero(is_scale & is_ternary))
