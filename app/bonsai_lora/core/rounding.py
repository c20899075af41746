"""What rounding to a float type with few bits leaves of a small change: closed forms.

The change D is normal with the standard deviation sigma, and the type's step near W is u. If W lies
on the type's grid, round(W + D) - W is D rounded to multiples of u, and everything depends on z = u
/ sigma alone. If W lies anywhere, rounding adds noise, but is right on average: the gain is 1.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Weights(NamedTuple):
    """What the gain depends on of the weights of a matrix."""

    exponents: Mapping[int, int]
    """Number of values by exponent floor(log2 |W|); zeros are not counted."""
    on_grid: Mapping[str, float]
    """Share of the values that BF16 and F16 hold exactly; of other types it is 1."""


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
    squares: npt.NDArray[np.float64], width: int, weights: Weights, dtype: str
) -> float:
    """Return the sum of gain * |D|^2 over rows of D with these squared norms and this width.

    All rows share the distribution of `weights`. sigma is rounded to a sixteenth of a power of two.
    """
    bits, least = MANTISSA_BITS[dtype]
    present = squares[squares > 0]
    exponents, total = weights.exponents, sum(weights.exponents.values())
    if not len(present) or not total:
        return float(present.sum())
    sigmas = np.rint(_STEPS * np.log2(present / width) / 2).astype(np.int64)
    levels, places = np.unique(sigmas, return_inverse=True)
    by_level = np.bincount(places, weights=present)
    steps = np.array([max(one, least) - bits for one in exponents]) * _STEPS
    shares = np.array([*exponents.values()]) / total
    entry = np.clip(steps[None] - levels[:, None] - _LEAST * _STEPS + 1, 0, len(_TABLE) - 1)
    on_grid = weights.on_grid.get(dtype, 1.0)
    kept = float(by_level @ (_TABLE[entry] @ shares))
    return on_grid * kept + (1 - on_grid) * float(present.sum())
