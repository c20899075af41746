"""The values of GGUF's key-value pairs: types, and a cursor that walks over them.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Arrays are skipped, not decoded:
a tokenizer has hundreds of thousands of strings.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from bonsai_lora.errors import HeaderTooLargeError, MalformedGgufError

ReadAt = Callable[[int, int], bytes | memoryview]
"""Return `size` bytes of a file from `offset`, fewer only at its end."""


class ValueType(IntEnum):
    """Type of a value, or of the elements of an array."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: Mapping[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("u1"), ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"), ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"), ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"), ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"), ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}  # fmt: skip
"""Dtype of every type of fixed size."""

Scalar = int | float | bool | str

ARRAY_HEAD = struct.Struct("<IIQ")
"""ARRAY, the type of the elements, their number."""
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a key-value pair: decoded unless it is an array."""

    type: ValueType
    content: Scalar | None
    """None for an array, which `read_array` decodes. Invalid UTF-8 is replaced by U+FFFD."""
    start: int
    stop: int
    """Byte range in the file, from the value's type on."""
    item: ValueType | None = None
    count: int = 1
    """Type and number of the elements of an array."""


def read_exactly(read: ReadAt, start: int, size: int, what: str) -> bytes | memoryview:
    """Return `size` bytes from `start`; raises MalformedGgufError if the file ends in `what`."""
    raw = read(start, size)
    if len(raw) != size:
        raise malformed(f"it ends after {start + len(raw)} bytes, inside {what}")
    return raw


def read_integers(
    read: ReadAt, value: Value | None, most: int
) -> npt.NDArray[np.integer[Any]] | None:
    """Return an array of at most `most` integers; None for any other value, and for no value."""
    if value is None or value.item is None or value.count > most:
        return None
    found = read_array(read, value)
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.integer):
        return None
    return found


def read_array(read: ReadAt, value: Value) -> npt.NDArray[Any] | list[str]:
    """Return the elements of an array: strings as a list, all others as a read-only array (n,).

    Raises MalformedGgufError if the file has become shorter.
    """
    assert value.item is not None
    start = value.start + ARRAY_HEAD.size
    if value.item is not ValueType.STRING:
        dtype = DTYPES[value.item]
        raw = read_exactly(read, start, value.count * dtype.itemsize, "an array")
        if dtype == np.bool_:  # any byte but 0 is true
            flags: npt.NDArray[Any] = np.frombuffer(raw, np.uint8) != 0
            return flags
        return np.frombuffer(raw, dtype)
    cursor = Cursor(read, value.stop, value.stop, start)
    return [cursor.text() for _ in range(value.count)]


class Cursor:
    """Walks over the header of a file, of which one window is in memory.

    Every method raises MalformedGgufError past the end of the file, HeaderTooLargeError past
    `limit`.
    """

    def __init__(self, read: ReadAt, total_bytes: int, limit: int, position: int = 0) -> None:
        self._read = read
        self._total = total_bytes
        self._limit = limit
        self._window: bytes | memoryview = b""
        self._start = position
        self.position = position

    @property
    def remaining(self) -> int:
        """Bytes to the end of the file."""
        return self._total - self.position

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        at = self.position - self._start
        if at + size > len(self._window):
            self._load(size)
            at = 0
        self.position += size
        return bytes(self._window[at : at + size])

    def skip(self, size: int) -> None:
        """Move on by `size` bytes, which must exist."""
        self._check(size)
        self.position += size
        if self.position > self._start + len(self._window):
            self._window, self._start = b"", self.position

    def u32(self) -> int:
        """Return the next four bytes as a number."""
        number: int = _U32.unpack(self.take(4))[0]
        return number

    def u64(self) -> int:
        """Return the next eight bytes as a number."""
        number: int = _U64.unpack(self.take(8))[0]
        return number

    def text(self) -> str:
        """Return the next string; invalid UTF-8 becomes U+FFFD."""
        return self.take(self.u64()).decode("utf-8", "replace")

    def name(self, what: str) -> str:
        """Return the next string, which must be UTF-8."""
        raw = self.take(self.u64())
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise malformed(f"{what} {raw[:40]!r} is not UTF-8") from None

    def skip_strings(self, count: int) -> None:
        """Move on by `count` strings. This is the hot loop of opening a model."""
        self._check(8 * count)
        unpack = _U64.unpack_from
        while count:
            if self.position + 8 > self._start + len(self._window):
                self._load(8)
            window, at = self._window, self.position - self._start
            last = len(window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(self._start + at - self.position)

    def value(self, what: str) -> Value:
        """Return the next value; `what` names it in errors."""
        start, number = self.position, self.u32()
        kind = _type_of(number, what)
        if kind is ValueType.ARRAY:
            return self._array(start, what)
        content: Scalar
        if kind is ValueType.STRING:
            content = self.text()
        elif kind is ValueType.BOOL:
            content = self.take(1) != b"\0"
        else:
            dtype = DTYPES[kind]
            content = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        return Value(kind, content, start, self.position)

    def _array(self, start: int, what: str) -> Value:
        item, count = _type_of(self.u32(), what), self.u64()
        if item is ValueType.ARRAY:
            raise malformed(f"{what} is an array of arrays")
        if item is ValueType.STRING:
            self.skip_strings(count)
        else:
            self.skip(count * DTYPES[item].itemsize)
        return Value(ValueType.ARRAY, None, start, self.position, item, count)

    def _load(self, size: int) -> None:
        self._check(size)
        most = min(self._total, self._limit) - self.position
        self._start = self.position
        self._window = self._read(self.position, min(max(size, _WINDOW_BYTES), most))
        if len(self._window) < size:
            raise malformed(f"it ends after {self.position + len(self._window)} bytes")

    def _check(self, size: int) -> None:
        if size > self.remaining:
            raise malformed(
                f"{size} more bytes are needed at offset {self.position}, but the file ends "
                f"after {self._total} bytes"
            )
        if self.position + size > self._limit:
            raise HeaderTooLargeError(
                f"the GGUF header has {self.position + size} bytes or more, but the limit is "
                f"{self._limit}; use a smaller tokenizer, or fewer tensors",
                got_bytes=self.position + size,
                limit_bytes=self._limit,
            )


def _type_of(number: int, what: str) -> ValueType:
    try:
        return ValueType(number)
    except ValueError:
        raise malformed(f"{what} has the unknown value type {number}") from None


def malformed(reason: str) -> MalformedGgufError:
    """Return the error for a broken rule of the format."""
    return MalformedGgufError(f"not a valid GGUF file: {reason}; save or copy the file again")
