"""The safetensors format: a JSON header, then the bytes of the tensors, without gaps.

Format: https://huggingface.co/docs/safetensors, checked as strictly as by its Rust reader. The
`safetensors` package is not used because it copies every tensor, lacks bfloat16 for NumPy, and
does not report which rule was broken (docs/decisions/0004-safetensors.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from bonsai_lora.core.cast import FLOAT32, Array
from bonsai_lora.errors import (
    HeaderTooLargeError,
    InvalidRequestError,
    MalformedSafetensorsError,
    ShapeMismatchError,
    counted,
)
from bonsai_lora.formats.dtypes import DTYPE_NAMES, ELEMENT_BITS, FLOAT_DTYPES
from bonsai_lora.formats.foreign import LFS_POINTER
from bonsai_lora.formats.large_json import ObjectReader, dump

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 64
FEW_TENSORS = 64
"""Far more than a request about a single module has."""
_MAX_SIZE = 2**63 - 1
_SHORT_BYTES = 1 << 10
"""Headers up to this length are cached."""
_REMEMBERED = 1024
"""Size of the header caches: a decode step of a 36-layer model has 144 different headers."""
_FEW = 8
_MOST_METADATA = 1 << 14
_MAX_DIMENSIONS = 64  # NumPy's limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype name and shape of a tensor, and its byte range [start, stop) after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the tensors in data order, and where the data starts."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    """Offset in bytes of the first tensor from the start of the file."""
    total_bytes: int
    """Length of the whole file."""


def header_length(prefix: bytes | memoryview, limit: int = MAX_HEADER_BYTES) -> int:
    """Return the length of the JSON header, read from the first 8 bytes.

    Raises MalformedSafetensorsError for fewer than 8 bytes or an impossible length,
    HeaderTooLargeError over `limit`.
    """
    if len(prefix) < _LENGTH_BYTES:
        raise _malformed(
            f"it has {counted(len(prefix), 'byte')}, fewer than the 8 of the header length"
        )
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        start = bytes(prefix[:_LENGTH_BYTES])
        if start == b"version ":
            raise MalformedSafetensorsError(f"the file is {LFS_POINTER}")
        raise _malformed(f"it starts with {start!r}, which is not the length of a header")
    if length > limit:
        raise HeaderTooLargeError(
            f"the safetensors header has {length} bytes, but the limit is {limit}; use fewer or "
            "shorter names",
            got_bytes=length,
            limit_bytes=limit,
        )
    return length


def decode_header(
    raw: bytes | memoryview, *, limit: int = MAX_HEADER_BYTES, most: int | None = None
) -> Header:
    """Return the checked header of a file whose first bytes are `raw` (data may follow).

    Raises MalformedSafetensorsError for a broken rule, HeaderTooLargeError over `limit` bytes, or
    for more than `most` tensors in a long header. The length of the data is not compared: see
    `Header.total_bytes`.
    """
    length = header_length(raw, limit)
    stop = _LENGTH_BYTES + length
    if len(raw) < stop:
        raise _malformed(
            f"the header is {counted(length, 'byte')} long, but the file ends after {len(raw) - 8}"
        )
    text = bytes(raw[_LENGTH_BYTES:stop])
    if length <= _SHORT_BYTES:
        return _decode_short(text)
    count = text.count(b'"data_offsets"')  # cheap, before they are parsed
    if most is not None and count > most:
        raise HeaderTooLargeError(
            f"the safetensors header has {count} tensors, but the limit is {most}; send fewer",
            got=count,
            limit=most,
        )
    return _decode_text(text)


def _decode_text(text: bytes) -> Header:
    infos, metadata = _parse(text)
    ordered = _in_data_order(infos)
    _check_contiguous(ordered)
    start = _LENGTH_BYTES + len(text)
    stop = max((info.stop for info in ordered.values()), default=0)
    return Header(MappingProxyType(ordered), MappingProxyType(metadata), start, start + stop)


def _in_data_order(infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    if len(infos) <= _FEW:
        return dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    starts = np.fromiter((one.start for one in infos.values()), np.int64, len(infos))
    stops = np.fromiter((one.stop for one in infos.values()), np.int64, len(infos))
    names = [*infos]
    # NumPy sorts a million tensors in a tenth of the time, in which no other thread runs.
    order = [names[place] for place in np.lexsort((stops, starts))]
    return {name: infos[name] for name in order}


# Requests with the same shapes have the same header: 3 µs from the cache instead of 30 µs.
_decode_short = lru_cache(_REMEMBERED)(_decode_text)


def decode(
    raw: bytes | memoryview, *, limit: int = MAX_HEADER_BYTES, most: int | None = None
) -> tuple[dict[str, Array], Mapping[str, str]]:
    """Return the tensors by name, as views of `raw`, and the metadata.

    Raises MalformedSafetensorsError unless the length matches the header exactly, and
    InvalidRequestError for a dtype other than F32, F16, BF16, F64.
    """
    header = decode_header(raw, limit=limit, most=most)
    check_total(header, len(raw))
    return {name: view(raw, header, name) for name in header.tensors}, header.metadata


def check_total(header: Header, total_bytes: int) -> None:
    """Raise MalformedSafetensorsError unless `total_bytes` is the length given by the header."""
    if total_bytes != header.total_bytes:
        raise _malformed(
            f"the header describes {counted(header.total_bytes, 'byte')} in all, but there are "
            f"{total_bytes}"
        )


def view(
    raw: bytes | memoryview,
    header: Header,
    name: str,
    dtypes: Mapping[str, np.dtype[Any]] = FLOAT_DTYPES,
) -> Array:
    """Return the tensor `name` as a read-only view of `raw`, a whole file.

    Raises InvalidRequestError for a dtype outside `dtypes`.
    """
    info = header.tensors[name]
    dtype = dtype_of(header, name, dtypes)
    count = (info.stop - info.start) // dtype.itemsize
    flat = np.frombuffer(raw, dtype, count, header.data_start + info.start)
    try:
        array = flat.reshape(info.shape)
    except ValueError:  # an empty tensor with a dimension beyond the limit of NumPy
        raise ShapeMismatchError(
            f"tensor {name!r} has the shape {list(info.shape)}, which is too large",
            tensor=name,
            got=list(info.shape),
        ) from None
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def dtype_of(
    header: Header, name: str, dtypes: Mapping[str, np.dtype[Any]] = FLOAT_DTYPES
) -> np.dtype[Any]:
    """Return the dtype of the tensor `name`; raises InvalidRequestError outside `dtypes`."""
    found = header.tensors[name].dtype
    dtype = dtypes.get(found)
    if dtype is None:
        raise InvalidRequestError(
            f"tensor {name!r} is {found}; expected one of {', '.join(dtypes)}",
            tensor=name,
            got=found,
            expected=list(dtypes),
        )
    return dtype


Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> dtype name and shape, in data order."""


def layout_of(tensors: Mapping[str, Array]) -> Layout:
    """Return the layout of float arrays."""
    return {name: (DTYPE_NAMES[array.dtype], array.shape) for name, array in tensors.items()}


def encode_header(
    tensors: Layout,
    metadata: Mapping[str, str] | None = None,
    *,
    length: int | None = None,
) -> bytes:
    """Return the header bytes for tensors (dtype name, shape) laid out in the given order.

    The data starts at a multiple of 64 bytes, or after exactly `length` bytes if that is given.
    Raises ValueError if `length` is too small.
    """
    texts = {} if metadata is None else metadata
    if (
        length is None
        and len(tensors) <= _FEW
        and len(texts) <= _FEW
        and sum(map(len, texts.values())) <= _SHORT_BYTES
    ):
        about = None if metadata is None else tuple(metadata.items())
        return _encode_short(tuple(tensors.items()), about)
    return _encode_text(tensors, metadata, length)


@lru_cache(_REMEMBERED)
def _encode_short(
    layout: tuple[tuple[str, tuple[str, tuple[int, ...]]], ...],
    metadata: tuple[tuple[str, str], ...] | None,
) -> bytes:
    """Return the header of a response, the same for all responses with the same shapes."""
    return _encode_text(dict(layout), None if metadata is None else dict(metadata), None)


def _encode_text(tensors: Layout, metadata: Mapping[str, str] | None, length: int | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * ELEMENT_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = dump(entries, separators=(",", ":"), ensure_ascii=False).encode()
    needed = _LENGTH_BYTES + len(text)
    total = -(-needed // _ALIGNMENT) * _ALIGNMENT if length is None else length
    if total < needed:
        raise ValueError(f"the header needs {needed} bytes, more than the {total} given")
    return (total - _LENGTH_BYTES).to_bytes(8, "little") + text.ljust(total - _LENGTH_BYTES)


def encode(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the file that holds `tensors` (float arrays) in the given order."""
    return b"".join(encode_parts(tensors, metadata))


def encode_parts(
    tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """Return the same file in parts: its header, then each tensor's bytes, not copied."""
    return [encode_header(layout_of(tensors), metadata), *map(as_bytes, tensors.values())]


def as_bytes(array: Array) -> memoryview:
    """Return the row-major little-endian bytes of `array`, without a copy if possible."""
    if array.dtype == FLOAT32 and array.size and array.flags.c_contiguous:
        return array.data.cast("B")
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # NumPy arrays are buffers


def _malformed(reason: str) -> MalformedSafetensorsError:
    return MalformedSafetensorsError(
        f"not a valid safetensors file: {reason}; save or copy the file again"
    )


def _parse(raw: bytes) -> tuple[dict[str, TensorInfo], Mapping[str, str]]:
    """Return the tensors and the metadata of a header, in the order of the text."""
    if not raw.startswith(b"{"):
        raise _malformed("the header does not start with '{'")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    try:
        text = raw.decode("utf-8")
        reader = ObjectReader(text)
        for name in reader.names():
            if name in tensors or (name == _METADATA and metadata is not None):
                raise _malformed(f"the key {name[:100]!r} occurs twice")
            if name == _METADATA:
                metadata = _read_metadata(reader)
            else:
                tensors[name] = _check_entry(name, reader.value())
        reader.end()
        if "\\u" in text:  # half a surrogate pair cannot be written
            for one in (*tensors, *(metadata or {}), *(metadata or {}).values()):
                one.encode()
    except UnicodeError:
        raise _malformed("the header is not UTF-8, or has an unpaired surrogate") from None
    except ValueError as error:
        raise _malformed(f"the header is not as JSON should be: {error}") from None
    return tensors, metadata or {}


def _read_metadata(reader: ObjectReader) -> dict[str, str]:
    if not reader.is_at_object():
        if reader.value() is None:  # accepted by the Rust reader
            return {}
        raise _malformed("__metadata__ must map strings to strings")
    metadata: dict[str, str] = {}
    for name in reader.names():
        if name in metadata:
            raise _malformed(f"the key {name[:100]!r} occurs twice")
        value = reader.value()
        if not isinstance(value, str):
            raise _malformed("__metadata__ must map strings to strings")
        metadata[name] = value
        if len(metadata) > _MOST_METADATA:
            raise _malformed(f"__metadata__ has more than {_MOST_METADATA} entries")
    return metadata


def _check_entry(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(f"tensor {name[:100]!r} must have exactly dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise _malformed(f"tensor {name[:100]!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise _malformed(f"tensor {name[:100]!r} has a shape that is not a list of sizes")
    if len(shape) > _MAX_DIMENSIONS:
        raise _malformed(f"tensor {name[:100]!r} has {counted(len(shape), 'dimension')}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _malformed(f"tensor {name[:100]!r} must have data_offsets [begin, end]")
    bits = math.prod(shape) * ELEMENT_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise _malformed(
            f"tensor {name[:100]!r} of dtype {dtype} and shape {shape} has "
            f"{bits // 8} bytes, but its data_offsets {offsets} say {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _check_contiguous(tensors: Mapping[str, TensorInfo]) -> None:
    expected = 0
    for name, info in tensors.items():
        start = info.start
        if start != expected:
            kind = "overlaps the previous one" if start < expected else "leaves a gap"
            raise _malformed(f"tensor {name[:100]!r} starts at {start}, not {expected}: it {kind}")
        expected = info.stop
