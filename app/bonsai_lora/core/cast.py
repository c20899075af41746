"""Float dtypes, casts between them, and whether numbers are finite."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bonsai_lora.core import backend

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_float32(array: Array, out: Floats | None = None) -> Floats:
    """Return `array` (any float dtype) as C-contiguous float32, in `out` if given.

    Without `out`, an aligned contiguous float32 array is returned without a copy. Doubles beyond
    float32 become infinite.
    """
    if array.dtype == FLOAT32 and out is None:
        flags = array.flags
        if flags.c_contiguous and flags.aligned:
            return array
        return np.require(array, requirements=["C", "A"])
    if out is None:
        out = np.empty(array.shape, FLOAT32)
    backend.cast(array, out)
    return out


def count_rows(batch: Array) -> int:
    """Return the number of vectors: 1 for (width,), n for (n, width)."""
    return 1 if batch.ndim == 1 else len(batch)


def all_finite(array: Array) -> bool:
    """Return whether a float32, float16 or bfloat16 array has no NaN and no infinity."""
    if array.size == 0:
        return True
    if array.dtype == FLOAT32:
        # The sum of squares takes one pass, and is finite only if all numbers are.
        if array.flags.c_contiguous and math.isfinite(np.vdot(array, array)):
            return True
        # It may also have overflowed. NaN propagates through minimum and maximum.
        least, most = np.minimum.reduce(array, axis=None), np.maximum.reduce(array, axis=None)
        return math.isfinite(least) and math.isfinite(most)
    exponent = np.uint16(0x7C00 if array.dtype == FLOAT16 else 0x7F80)
    return bool(((array.view(np.uint16) & exponent) != exponent).all())
