"""Float32 values as GGUF's Q8_0, bit-equal to llama.cpp's files.

`quantize_row_q8_0_ref` of ggml/src/ggml-quants.c writes files; its vectorized variants, which round
differently, only quantize activations.
"""

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.cast import Floats

_BLOCK = 32
_BYTES = 34
_PIECE_VALUES = 1 << 16
_SIGN = np.uint32(1 << 31)
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0)).view(np.uint32)


def quantize_q8_0(values: Floats) -> npt.NDArray[np.uint8]:
    """Return the bytes (n / 32 * 34,) of n values in memory order, n a multiple of 32.

    A block has the scale max|x| / 127, and codes rounded half away from zero. A block with an
    infinity or NaN, or with a scale beyond float16, has no finite values.
    """
    rows = values.reshape(-1, _BLOCK)
    blocks = np.empty((len(rows), _BYTES), np.uint8)
    step = _PIECE_VALUES // _BLOCK
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            _quantize(rows[start : start + step], blocks[start : start + step])
    return blocks.reshape(-1)


def _quantize(rows: Floats, blocks: npt.NDArray[np.uint8]) -> None:
    largest = np.ascontiguousarray(np.abs(rows).T).max(axis=0)  # three times faster than axis 1
    scale = largest / np.float32(127)
    inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    codes = rows * inverse[:, None]
    # Adding a little less than half before truncation rounds halves away from zero, and only them.
    codes += ((codes.view(np.uint32) & _SIGN) | _BELOW_HALF).view(np.float32)
    blocks[:, :2] = scale.astype("<f2")[:, None].view(np.uint8)
    blocks[:, 2:] = codes.astype(np.int8).view(np.uint8)
