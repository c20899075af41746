"""The GGUF format, read: key-value pairs, then tensor descriptions, then aligned tensor data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, with the limits of llama.cpp's
reader (ggml/src/gguf.cpp, release b11434). Only the header is read, in pieces of 1 MiB, and arrays
are skipped, so opening a model takes a constant amount of memory. Files are written by gguf_writer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bonsai_lora.errors import MalformedGgufError, UnsupportedGgufError, counted
from bonsai_lora.formats.foreign import LFS_POINTER
from bonsai_lora.formats.gguf_layouts import Entry, TensorInfo, padded, place
from bonsai_lora.formats.gguf_types import TYPES
from bonsai_lora.formats.gguf_values import Cursor, ReadAt, Scalar, Value, ValueType, malformed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000
"""As for safetensors. The largest tokenizers, of 262,144 tokens, need some 20 MB."""
MAX_PAIRS = MAX_TENSORS = 1 << 16
"""Each takes some hundred bytes of memory."""
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

_MAX_ELEMENTS = 2**63 - 1
_PAIR_BYTES = 8 + 1 + 4 + 1
_ENTRY_BYTES = 8 + 4 + 4 + 8
"""Least lengths of a pair and of a tensor description."""


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the pairs and the tensors, both in file order."""

    version: int
    pairs: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data_start: int
    """Offset in bytes of the first tensor from the start of the file."""

    def get(self, key: str) -> Scalar | None:
        """Return a number, boolean or string; None if there is no such key, or it is an array."""
        value = self.pairs.get(key)
        return None if value is None else value.content

    @property
    def architecture(self) -> str:
        """`general.architecture`; empty if missing."""
        found = self.get("general.architecture")
        return found if isinstance(found, str) else ""


def reader_of(raw: bytes | memoryview) -> ReadAt:
    """Return a reader of a file in memory."""
    view = memoryview(raw)
    return lambda offset, size: view[offset : offset + size]


def read_header(read: ReadAt, total_bytes: int, *, limit: int = MAX_HEADER_BYTES) -> Header:
    """Return the checked header of a file of `total_bytes`.

    Raises MalformedGgufError for a broken rule, HeaderTooLargeError over `limit` bytes,
    UnsupportedGgufError for a tensor type without a known layout. Besides the header, some blocks
    of type 42 are read if its layout is in doubt.
    """
    cursor = Cursor(read, total_bytes, limit)
    version = _read_version(cursor)
    tensors, pairs = cursor.u64(), cursor.u64()
    _check_count(pairs, MAX_PAIRS, _PAIR_BYTES, cursor, "key-value pairs")
    _check_count(tensors, MAX_TENSORS, _ENTRY_BYTES, cursor, "tensors")
    values = _read_pairs(cursor, pairs)
    alignment = _alignment(values)
    entries = _read_entries(cursor, tensors)
    start = padded(cursor.position, alignment) if entries else cursor.position
    if start > total_bytes:
        raise malformed(f"its data starts at {start}, but it ends after {total_bytes} bytes")
    version_of_types = values.get("general.quantization_version")
    placed = place(
        entries,
        start,
        total_bytes - start,
        alignment,
        read,
        # OxiBonsai writes "TQ2_0_G128" where all others write the number 2.
        scale_is_last=version_of_types is not None and version_of_types.type is ValueType.STRING,
    )
    return Header(version, MappingProxyType(values), MappingProxyType(placed), alignment, start)


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(min(4, cursor.remaining))
    if magic == b"vers":
        raise MalformedGgufError(f"the file is {LFS_POINTER}")
    if magic != MAGIC:
        raise malformed(f"it starts with {magic!r}, not {MAGIC!r}")
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise malformed("it is big-endian")
    if version not in VERSIONS:
        raise malformed(f"it has version {version} of the format; 2 and 3 are known")
    return version


def _check_count(count: int, most: int, least_bytes: int, cursor: Cursor, what: str) -> None:
    if count > most:
        raise malformed(f"it announces {count} {what}, more than the {most} that are read")
    if count * least_bytes > cursor.remaining:
        raise malformed(f"it announces {count} {what}, but only {cursor.remaining} bytes follow")


def _read_pairs(cursor: Cursor, count: int) -> dict[str, Value]:
    pairs: dict[str, Value] = {}
    for number in range(count):
        key = cursor.name(f"key {number}")
        if not key:
            raise malformed(f"key {number} is empty")
        if key in pairs:
            raise malformed(f"the key {key[:100]!r} occurs twice")
        pairs[key] = cursor.value(f"the key {key[:100]!r}")
    return pairs


def _alignment(pairs: Mapping[str, Value]) -> int:
    value = pairs.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    found = value.content
    if value.type is not ValueType.UINT32 or not isinstance(found, int):
        raise malformed(f"{ALIGNMENT_KEY} is of type {value.type.name}, not UINT32")
    if found.bit_count() != 1:
        raise malformed(f"{ALIGNMENT_KEY} is {found}, not a power of two")
    return found


def _read_entries(cursor: Cursor, count: int) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for number in range(count):
        name = cursor.name(f"the name of tensor {number}")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise malformed(f"the tensor name {name[:100]!r} is longer than {MAX_NAME_BYTES} bytes")
        if name in entries:
            raise malformed(f"the tensor {name!r} occurs twice")
        shape = _read_shape(cursor, name)
        kind, offset = cursor.u32(), cursor.u64()
        if kind not in TYPES:
            raise UnsupportedGgufError(
                f"tensor {name!r} has the unknown type {kind}; convert the model to one of "
                f"{', '.join(one.name for one in TYPES.values())}",
                tensor=name,
                got=kind,
            )
        entries[name] = Entry(name, shape, kind, offset)
    return [*entries.values()]


def _read_shape(cursor: Cursor, name: str) -> tuple[int, ...]:
    count = cursor.u32()
    if count > MAX_DIMENSIONS:
        raise malformed(
            f"tensor {name!r} has {counted(count, 'dimension')}, more than {MAX_DIMENSIONS}"
        )
    shape = tuple(cursor.u64() for _ in range(count))[::-1]
    # Without the zeros: a product of other dimensions beyond 2^63 is refused beside a zero, too.
    if math.prod(size for size in shape if size) > _MAX_ELEMENTS:
        raise malformed(f"tensor {name!r} has the shape {list(shape)}, which is too large")
    return shape
