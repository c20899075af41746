"""The GGUF format, written: the header and the place of every tensor, before any data exists.

The bytes depend on the arguments alone, so a file can be computed in pieces and in any order. See
gguf for the format and its reader.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats.gguf import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
)
from bonsai_lora.formats.gguf_layouts import TensorInfo, padded
from bonsai_lora.formats.gguf_types import TensorType
from bonsai_lora.formats.gguf_values import ARRAY_HEAD, DTYPES, ReadAt, Value, ValueType

_VERSION = 3
_TYPES = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as it is in a file, from its type on. See `encoded_value`."""

    raw: bytes | memoryview


Writable = Encoded | np.generic | bool | str | npt.NDArray[Any] | Sequence[str]
"""A value to write. NumPy's scalars and arrays have the type of their dtype: np.uint32(1)."""

Layout = Mapping[str, tuple[TensorType, tuple[int, ...]]]
"""Tensor name -> type and shape as in NumPy, in file order."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A file to be written: its first bytes, and where each tensor belongs."""

    head: bytes
    """Everything before the data. Bytes between tensors, and after the last, are zero."""
    tensors: Mapping[str, TensorInfo]
    total_bytes: int


def plan(pairs: Mapping[str, Writable], tensors: Layout) -> Plan:
    """Return the plan of a file with these pairs and tensors, both in the given order.

    `general.alignment` among the pairs is followed. Raises UnsupportedGgufError for a tensor that
    the format cannot hold.
    """
    alignment = _alignment(pairs.get(ALIGNMENT_KEY))
    parts: list[bytes | memoryview] = [
        MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(pairs))
    ]
    for key, value in pairs.items():
        parts += [_text(key), encode_value(value)]
    offset, offsets = 0, []
    for name, (kind, shape) in tensors.items():
        _check(name, kind, shape)
        parts.append(_description(name, kind, shape, offset))
        offsets.append(offset)
        offset += padded(kind.bytes_of(math.prod(shape)), alignment)
    head = b"".join(parts)
    start = padded(len(head), alignment)
    placed = {
        name: TensorInfo(kind, shape, start + at, start + at + kind.bytes_of(math.prod(shape)))
        for at, (name, (kind, shape)) in zip(offsets, tensors.items(), strict=True)
    }
    return Plan(head.ljust(start, b"\0"), placed, start + offset)


def encode(
    pairs: Mapping[str, Writable], tensors: Mapping[str, tuple[TensorType, Any, bytes]]
) -> bytes:
    """Return a whole file; `tensors` are type, shape and bytes by name."""
    made = plan(pairs, {name: (kind, shape) for name, (kind, shape, _) in tensors.items()})
    content = bytearray(made.total_bytes)
    content[: len(made.head)] = made.head
    for name, info in made.tensors.items():
        raw = tensors[name][2]
        if len(raw) != info.stop - info.start:
            raise ValueError(f"{name} has {len(raw)} bytes, not {info.stop - info.start}")
        content[info.start : info.stop] = raw
    return bytes(content)


def encoded_value(read: ReadAt, value: Value) -> Encoded:
    """Return a value of a file as it is, to be written to a different file."""
    return Encoded(read(value.start, value.stop - value.start))


def encode_value(value: Writable) -> bytes | memoryview:
    """Return the bytes of a value, from its type on.

    Raises TypeError for a dtype that is not a type of GGUF values.
    """
    if isinstance(value, Encoded):
        return value.raw
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _text(value)
    if isinstance(value, np.ndarray):
        if value.ndim != 1:
            raise TypeError(f"an array of {value.ndim} dimensions cannot be a value of GGUF")
        dtype = value.dtype.newbyteorder("<")
        return (
            ARRAY_HEAD.pack(ValueType.ARRAY, _type_of(dtype), len(value))
            + value.astype(dtype).tobytes()
        )
    if isinstance(value, bool | np.generic):
        scalar = np.asarray(value)
        dtype = scalar.dtype.newbyteorder("<")
        return struct.pack("<I", _type_of(dtype)) + scalar.astype(dtype).tobytes()
    head = ARRAY_HEAD.pack(ValueType.ARRAY, ValueType.STRING, len(value))
    return b"".join([head, *map(_text, value)])


def _type_of(dtype: np.dtype[Any]) -> ValueType:
    try:
        return _TYPES[dtype]
    except KeyError:
        raise TypeError(f"{dtype} is not a type of GGUF values") from None


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _description(name: str, kind: TensorType, shape: tuple[int, ...], offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return _text(name) + sizes + struct.pack("<IQ", kind.id, offset)


def _alignment(value: Writable | None) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    if isinstance(value, Encoded):
        return int.from_bytes(value.raw[4:8], "little")
    assert isinstance(value, np.uint32)
    return int(value)


def _check(name: str, kind: TensorType, shape: tuple[int, ...]) -> None:
    """Raise UnsupportedGgufError for what llama.cpp would refuse to read."""
    length = len(name.encode())
    if length > MAX_NAME_BYTES:
        raise UnsupportedGgufError(
            f"the tensor name {name[:100]!r} has {length} bytes, but GGUF allows {MAX_NAME_BYTES}; "
            "use safetensors",
            tensor=name,
        )
    if len(shape) > MAX_DIMENSIONS or (shape[-1] if shape else 1) % kind.block:
        raise UnsupportedGgufError(
            f"tensor {name!r} of shape {list(shape)} cannot be {kind.name}, which has blocks of "
            f"{kind.block} elements; use F16 or F32",
            tensor=name,
            got=list(shape),
        )
