"""Casts between float32 and the 16-bit floats, at memory speed (docs/decisions/0003-casts.md)."""

import ctypes
import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bonsai_lora.kernels.library import kernels
from bonsai_lora.kernels.numbers import Kind

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_KINDS: dict[np.dtype[Any], Kind] = {FLOAT32: "f32", FLOAT16: "f16", BFLOAT16: "bf16"}


def kind_of(dtype: np.dtype[Any]) -> Kind | None:
    """Return what the kernels call a dtype; None where they cannot read it."""
    kind = _KINDS.get(dtype)
    return None if kind == "f16" and not kernels().target.has_half else kind


def to_float32(array: Array, out: Floats | None = None) -> Floats:
    """Return `array` (any float dtype) as C-contiguous float32, in `out` if given.

    Without `out`, an aligned contiguous float32 array is returned as it is. Doubles beyond
    float32 become infinite.
    """
    if array.dtype == FLOAT32 and out is None:
        flags = array.flags
        if flags.c_contiguous and flags.aligned:
            return array
        return np.require(array, requirements=["C", "A"])
    if out is None:
        out = np.empty(array.shape, FLOAT32)
    _cast(array, out)
    return out


def round_to(array: Floats, out: Array) -> None:
    """Write float32 `array` into `out` (float32, float16 or bfloat16), rounded to nearest even."""
    _cast(array, out)


def address_of(array: Array) -> int:
    """Return where an array's first number is."""
    # NumPy's public C structure begins with it (PyArrayObject_fields in numpy/ndarraytypes.h).
    # __array_interface__ says the same and takes 0.9 µs for it, this 0.2.
    return _pointer_at(id(array) + object.__basicsize__).value or 0


_pointer_at = ctypes.c_void_p.from_address


def count_rows(batch: Array) -> int:
    """Return the number of vectors: 1 for (width,), n for (n, width)."""
    return 1 if batch.ndim == 1 else len(batch)


def all_finite(array: Array) -> bool:
    """Return whether a float32, float16 or bfloat16 array has no NaN and no infinity."""
    if array.size == 0:
        return True
    if array.dtype == FLOAT32:
        if array.flags.c_contiguous and math.isfinite(np.vdot(array, array)):
            return True  # one pass over the memory; what is not finite stays so in a sum of squares
        # Nor is that sum where it overflows. NaN survives both of these.
        least, most = np.minimum.reduce(array, axis=None), np.maximum.reduce(array, axis=None)
        return math.isfinite(least) and math.isfinite(most)
    exponent = np.uint16(0x7C00 if array.dtype == FLOAT16 else 0x7F80)
    return bool(((array.view(np.uint16) & exponent) != exponent).all())


def _cast(array: Array, out: Array) -> None:
    kinds = kind_of(array.dtype), kind_of(out.dtype)
    is_whole = array.flags.c_contiguous and out.flags.c_contiguous
    is_whole = is_whole and array.shape == out.shape and out.flags.writeable
    if None in kinds or kinds[0] == kinds[1] or not is_whole:
        with np.errstate(over="ignore"):
            np.copyto(out, array, casting="same_kind")
    else:
        kernels().cast(*kinds)(address_of(array), address_of(out), array.size)
