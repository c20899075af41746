"""How computed values are written: as a float dtype, or as Q8_0."""

from collections.abc import Callable

import numpy as np

from bonsai_lora.checkpoints.parts import Computed, Values
from bonsai_lora.core import backend
from bonsai_lora.core.cast import Array
from bonsai_lora.formats.dtypes import FLOAT_DTYPES
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.quantize import quantize_q8_0
from bonsai_lora.formats.safetensors import as_bytes


def computed_as(dtype: str, values: Values) -> Computed:
    """Return float32 values as a part of a file: F32, F16, BF16 or Q8_0."""
    return Computed(values, BY_NAME[dtype].bytes_of, _ENCODERS[dtype])


def _rounded(dtype: str) -> Callable[[Array], memoryview]:
    def encode(values: Array) -> memoryview:
        out: Array = np.empty(values.shape, FLOAT_DTYPES[dtype])
        backend.cast(values, out)
        return as_bytes(out)

    return encode


def _q8_0(values: Array) -> memoryview:
    return as_bytes(quantize_q8_0(values.reshape(-1)))


_ENCODERS = {"F32": as_bytes, "F16": _rounded("F16"), "BF16": _rounded("BF16"), "Q8_0": _q8_0}
