"""Call the kernels with NumPy arrays: the functions of `core/definition.py` for supported input.

Each function returns None or False for unsupported input: a different dtype, float16 on a CPU that
cannot convert it, rows that are not contiguous. The definition computes these.
"""

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bonsai_lora.kernels import apply, outer
from bonsai_lora.kernels.library import Call, Library
from bonsai_lora.kernels.numbers import Kind
from bonsai_lora.kernels.read_json import FOUND
from bonsai_lora.kernels.target import Target
from bonsai_lora.kernels.write_json import text_bytes

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)
_KINDS: dict[np.dtype[Any], Kind] = {
    _FLOAT32: "f32",
    np.dtype(np.float16): "f16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
}

_APPLY_PANEL_VALUES = 1 << 13
"""Values of B that are transposed at a time for all rows; they fit in the L1 cache."""
_MERGE_PANEL_VALUES = 1 << 16
"""Values of A per panel of a merge; they fit in the L2 cache, so that W is read in long runs."""
_LEAST_COLUMNS = 128
_LINE = 64


class ArrayKernels:
    """The kernels for one kind of CPU."""

    def __init__(self, target: Target) -> None:
        self._library = Library(target)
        self._kinds = {
            dtype: kind for dtype, kind in _KINDS.items() if kind != "f16" or target.has_half
        }

    def prepare(self) -> None:
        """Compile all but merges."""
        self._library.get("find")
        self._library.get("write")
        for kind in self._kinds.values():
            self._library.get("apply", kind)
            if kind != "f32":
                self._library.get("cast", kind, "f32")
                self._library.get("cast", "f32", kind)

    def make_apply(self, a_matrix: Array, b_matrix: Array) -> "Apply | None":
        """Return the function that applies A (r, d_in) and B (d_out, r)."""
        kind = self._kinds.get(a_matrix.dtype)
        if kind is None or a_matrix.dtype != b_matrix.dtype:
            return None
        return Apply(
            self._library.get("apply", kind), _with_whole_rows(a_matrix), _with_whole_rows(b_matrix)
        )

    def merge(self, base: Array, left: Floats, right: Array, factor: float, out: Array) -> bool:
        """Write base + factor * left @ right to `out`, if possible."""
        right_kind, kind = self._kinds.get(right.dtype), self._kinds.get(base.dtype)
        shape = (left.shape[0], right.shape[1])
        fits = base.shape == out.shape == shape and left.shape[1] == right.shape[0]
        fits = fits and base.dtype == out.dtype and left.dtype == _FLOAT32 and out.flags.writeable
        fits = fits and _has_whole_rows(base) and _has_whole_rows(out)
        if right_kind is None or kind is None or not fits:
            return False
        right = _with_whole_rows(right)
        panel = min(_panel(right.shape[0], _MERGE_PANEL_VALUES), max(1, shape[1]))
        with np.errstate(over="ignore"):
            factors = np.array([factor], np.float32)
        scratch, _owner = _scratch(outer.scratch_bytes(right.shape[0], panel))
        self._library.get("merge", right_kind, kind)(
            *(address_of(left), shape[0], *left.strides),
            *(address_of(right), right.shape[0], right.strides[0], shape[1]),
            *(panel, scratch, address_of(factors), 0),
            *(address_of(out), out.strides[0], address_of(base), base.strides[0]),
        )
        return True

    def cast(self, array: Array, out: Array) -> bool:
        """Write `array` to `out`, if possible."""
        kind, out_kind = self._kinds.get(array.dtype), self._kinds.get(out.dtype)
        fits = array.flags.c_contiguous and out.flags.c_contiguous
        fits = fits and array.shape == out.shape and out.flags.writeable
        if kind is None or out_kind is None or (kind == "f32") == (out_kind == "f32") or not fits:
            return False
        self._library.get("cast", kind, out_kind)(address_of(array), address_of(out), array.size)
        return True

    def find_lists(self, text: bytes | memoryview, least: int) -> list[tuple[int, int, Floats]]:
        """Return start, end and numbers of the lists of at least `least` numbers in JSON text.

        A list is skipped if it has a number whose digits reach about 2^64, an integer from 2^53 on,
        or a number whose last digit is worth less than 1e-300 or more than 1e38.
        """
        find = self._library.get("find")
        characters = np.frombuffer(text, np.uint8)
        # A number and its comma take at least two characters.
        room = np.empty(len(characters) // 2, np.float32)
        found = np.empty(FOUND, np.int64)
        arguments = address_of(characters), len(characters)
        lists: list[tuple[int, int, Floats]] = []
        at, used = 0, 0
        while find(*arguments, at, least, address_of(room) + 4 * used, address_of(found)):
            start, at, rows, columns = found.tolist()
            numbers = room[used : used + max(1, rows) * columns]
            used += len(numbers)
            lists.append((start, at, numbers.reshape(rows, columns) if rows else numbers))
        return lists

    def list_of(self, array: Floats) -> memoryview | None:
        """Return float32 numbers (n,) or (rows, n), all finite, as a JSON list."""
        if array.dtype != _FLOAT32 or array.ndim not in (1, 2):
            return None
        array = np.ascontiguousarray(array)
        rows, columns = (1, *array.shape)[-2:]
        room = np.empty(2 + text_bytes(rows, columns), np.uint8)
        size = self._library.get("write")(address_of(array), rows, columns, address_of(room) + 1)
        if array.ndim == 1:
            return room[1 : 1 + size].data
        text = room[: 2 + size].data
        text[0], text[-1] = ord("["), ord("]")
        return text


class Apply:
    """factor * (x A^T) B^T for one A and B, read in place from the mapped file."""

    def __init__(self, function: Call, a_matrix: Array, b_matrix: Array) -> None:
        self.matrices = a_matrix, b_matrix
        self._function = function
        (rank, d_in), d_out = a_matrix.shape, len(b_matrix)
        self._rank, self._d_out, self._panel = rank, d_out, _panel(rank, _APPLY_PANEL_VALUES)
        a, b = ((address_of(one), one.strides[0]) for one in self.matrices)
        self._arguments = a[0], rank, a[1], d_in, *b, d_out, self._panel

    def __call__(self, x: Array, factors: Floats) -> Floats:
        """Return outputs (n, d_out) for x (n, d_in) and factors (1,) or (n,)."""
        if x.dtype != _FLOAT32 or not _has_whole_rows(x):
            with np.errstate(over="ignore"):
                x = np.ascontiguousarray(x, np.float32)
        outputs = np.empty((len(x), self._d_out), np.float32)
        scratch, _owner = _scratch(apply.scratch_bytes(len(x), self._rank, self._panel))
        self._function(
            *(*self._arguments, address_of(x), len(x), x.strides[0]),
            *(address_of(factors), 0 if len(factors) == 1 else 4, scratch, address_of(outputs)),
        )
        return outputs


def address_of(array: Array) -> int:
    """Return the address of an array's first element."""
    # The first field of NumPy's public struct (PyArrayObject_fields in numpy/ndarraytypes.h).
    # __array_interface__ takes 0.9 µs for the same, this 0.2 µs.
    return ctypes.c_void_p.from_address(id(array) + object.__basicsize__).value or 0


def _has_whole_rows(matrix: Array) -> bool:
    """Return whether the numbers of each row are contiguous."""
    return matrix.shape[1] <= 1 or matrix.strides[1] == matrix.itemsize


def _with_whole_rows(matrix: Array) -> Array:
    """Return the matrix itself, or a copy if its rows are not contiguous."""
    if _has_whole_rows(matrix):
        return matrix
    if matrix.strides[0] == 0:  # broadcast rows, as in a new adapter, stay broadcast
        return np.broadcast_to(np.ascontiguousarray(matrix[:1]), matrix.shape)
    return np.ascontiguousarray(matrix)


def _panel(rank: int, values: int) -> int:
    """Return the number of columns of a panel of about `values` values."""
    fitting = values // max(1, rank)
    return max(_LEAST_COLUMNS, fitting - fitting % _LEAST_COLUMNS)


def _scratch(size: int) -> tuple[int, Array]:
    """Return the address of `size` bytes, aligned to a cache line, and the array that owns them."""
    room = np.empty(size + _LINE, np.uint8)
    return -(-address_of(room) // _LINE) * _LINE, room
