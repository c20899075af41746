"""What rounding to a float type with few bits leaves of a small change: closed forms.

W lies on the type's grid, whose step near W is u, and the change D is normal with the standard
deviation sigma. Then round(W + D) - W is D rounded to multiples of u, and everything depends on z =
u / sigma alone.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Counts = Mapping[int, int]
"""Number of values by exponent floor(log2 |W|); zeros are not counted."""

MANTISSA_BITS: Mapping[str, tuple[int, int]] = {
    "BF16": (7, -126),
    "F16": (10, -14),
    "F32": (23, -126),
}
"""By dtype: bits after the leading one, and the least exponent with all of them."""

_STEPS = 16
"""Table entries per power of two."""
_LEAST, _MOST = -6, 6
"""log2 z below which nothing is lost, and above which nothing is left."""


def gain(z: float) -> float:
    """Return <D', D> / |D|^2 for D' = D rounded to multiples of u: 2 z sum phi((k + 1/2) z)."""
    count = math.ceil(8 / z) + 2
    edges = (np.arange(count) + 0.5) * z
    return float(2 * z * np.sum(np.exp(-edges * edges / 2)) / math.sqrt(2 * math.pi))


_TABLE = np.array(
    [1.0, *(gain(2 ** (step / _STEPS)) for step in range(_LEAST * _STEPS, _MOST * _STEPS)), 0.0]
)


def kept_squares(
    squares: npt.NDArray[np.float64], width: int, exponents: Counts, dtype: str
) -> float:
    """Return the sum of gain * |D|^2 over rows of D with these squared norms and this width.

    `exponents` is the distribution of the base's exponents, which rows share. sigma is rounded to a
    sixteenth of a power of two.
    """
    bits, least = MANTISSA_BITS[dtype]
    present = squares[squares > 0]
    total = sum(exponents.values())
    if not len(present) or not total:
        return float(present.sum())
    sigmas = np.rint(_STEPS * np.log2(present / width) / 2).astype(np.int64)
    levels, places = np.unique(sigmas, return_inverse=True)
    weights = np.bincount(places, weights=present)
    steps = np.array([max(one, least) - bits for one in exponents]) * _STEPS
    shares = np.array([*exponents.values()]) / total
    entry = np.clip(steps[None] - levels[:, None] - _LEAST * _STEPS + 1, 0, len(_TABLE) - 1)
    return float(weights @ (_TABLE[entry] @ shares))
