"""What rounding does to the weights of a base: their exponents, and how exactly types hold them."""

import numpy as np

from bonsai_lora.checkpoints.base import Base, Tensor
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, to_float32
from bonsai_lora.core.merge import sampled_rows
from bonsai_lora.core.rounding import Weights
from bonsai_lora.formats.dtypes import FLOAT_DTYPES

SMALL_VALUES = 1 << 18
"""Tensors up to this size are counted entirely."""
EVERY = 64
"""Of larger tensors every 64th row is counted."""

_OFFSET = 256
_TYPES = {"BF16": BFLOAT16, "F16": FLOAT16}


def weights_of(base: Base) -> dict[str, Weights]:
    """Return the distribution of the weights of each matrix of floats; raises BaseChangedError.

    Reads a 64th of a large base.
    """
    found = {}
    for name in base.tensor_names:
        info = base.info(name)
        if info.dtype in FLOAT_DTYPES and len(info.shape) == 2:
            found[name] = _count(base.tensor(name))
    return found


def _count(tensor: Tensor) -> Weights:
    rows, columns = tensor.shape
    counts = np.zeros(2 * _OFFSET, np.int64)
    exact = dict.fromkeys(_TYPES, 0)
    for block in sampled_rows(rows, columns, most=SMALL_VALUES, distance=EVERY):
        values = to_float32(tensor[block])
        values = values[np.isfinite(values) & (values != 0)]
        counts += np.bincount(np.frexp(values)[1] - 1 + _OFFSET, minlength=len(counts))
        with np.errstate(over="ignore"):
            for name, dtype in _TYPES.items():
                exact[name] += int(np.count_nonzero(values.astype(dtype) == values))
    total = max(1, int(counts.sum()))
    return Weights(
        {int(one) - _OFFSET: int(counts[one]) for one in np.flatnonzero(counts)},
        {name: count / total for name, count in exact.items()},
    )
