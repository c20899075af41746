"""Values of GGUF's tensor types as float32, bit-equal to those of llama.cpp.

Layouts and order of operations follow ggml/src/ggml-quants.c (release b11434) and, for PQ2_0 and
PTQ1_0, PrismML's fork. Blocks are independent, so any run of whole blocks can be read alone. Work
is done in pieces that stay in the cache: 1- and 2-bit types look up a whole byte in a table of
float32 rows, the others widen small integers, and each value is multiplied by its scale once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.cast import BFLOAT16, FLOAT16, FLOAT32, Floats, to_float32
from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_types import TensorType
from bonsai_lora.formats.gguf_values import ReadAt, read_exactly

Bytes = npt.NDArray[np.uint8]

PLAIN_TYPES: Mapping[str, np.dtype[Any]] = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
"""The types whose values are stored as they are."""

_PIECE_VALUES = 1 << 16
"""Values computed at a time: 256 KiB of float32."""


def can_dequantize(kind: TensorType) -> bool:
    """Return whether `dequantize` reads this type."""
    return kind.name in PLAIN_TYPES or kind.name in _DECODERS


def dequantize(kind: TensorType, raw: bytes | memoryview | Bytes) -> Floats:
    """Return the values (n,) of whole blocks, maybe as a read-only view of `raw`.

    Raises UnsupportedGgufError for a type without a decoder, ValueError for a part of a block. NaNs
    of F16 and BF16 become one quiet NaN.
    """
    dtype = PLAIN_TYPES.get(kind.name)
    if dtype is not None:
        return to_float32(np.frombuffer(raw, dtype))
    decode = _DECODERS.get(kind.name)
    if decode is None:
        raise UnsupportedGgufError(
            f"tensors of type {kind.name} cannot be dequantized; use one of "
            f"{', '.join([*PLAIN_TYPES, *_DECODERS])}",
            got=kind.name,
        )
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, kind.size)
    rows = np.empty((len(blocks), kind.block), np.float32)
    step = _PIECE_VALUES // kind.block
    with np.errstate(all="ignore"):  # scales of untrusted files overflow
        for start in range(0, len(blocks), step):
            decode(blocks[start : start + step], rows[start : start + step])
    return rows.reshape(-1)


def read_rows(read: ReadAt, info: TensorInfo, start: int, stop: int) -> Floats:
    """Return the rows [start, stop) of a tensor, (n, width), counted over all leading dimensions.

    A vector is one row. Raises MalformedGgufError if the file has become shorter,
    UnsupportedGgufError for a type without a decoder.
    """
    first, size = info.start + start * info.row_bytes, (stop - start) * info.row_bytes
    raw = read_exactly(read, first, size, "a tensor")
    return dequantize(info.type, raw).reshape(stop - start, info.width)


def _scale(raw: Bytes) -> Floats:
    """Return float16 scales (n, 2 bytes) as float32 (n, 1)."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


_SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGN_ROWS: Floats = _SIGNS * np.float32(2) - np.float32(1)
"""Byte -> its 8 values in Q1_0, (256, 8)."""
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)
_PAIR_ROWS: Floats = ((np.arange(256, dtype=np.uint8)[:, None] >> _SHIFTS) & 3).astype(
    np.float32
) - np.float32(1)
"""Byte -> its 4 values in Q2_0, (256, 4)."""


def _lookup(table: Floats, codes: Bytes, scale: Floats, out: Floats) -> None:
    rows = out.reshape(*codes.shape, table.shape[1])
    np.take(table, codes, axis=0, out=rows, mode="clip")  # other modes copy `out`
    np.multiply(out, scale, out=out)


def _q1_0(blocks: Bytes, out: Floats) -> None:
    _lookup(_SIGN_ROWS, blocks[:, 2:], _scale(blocks[:, :2]), out)


def _q2_scale_first(blocks: Bytes, out: Floats) -> None:
    _lookup(_PAIR_ROWS, blocks[:, 2:], _scale(blocks[:, :2]), out)


def _q2_scale_last(blocks: Bytes, out: Floats) -> None:
    _lookup(_PAIR_ROWS, blocks[:, :-2], _scale(blocks[:, -2:]), out)


def _tq2_0(blocks: Bytes, out: Floats) -> None:
    """Byte m of 32 holds the elements m, 32 + m, 64 + m and 96 + m of a half block."""
    codes = (blocks[:, :64].reshape(-1, 2, 1, 32) >> _SHIFTS[:, None]) & np.uint8(3)
    ternary = np.subtract(codes.view(np.int8), 1).reshape(out.shape)
    np.multiply(ternary, _scale(blocks[:, 64:]), out=out)


def _tq1_0(blocks: Bytes, out: Floats) -> None:
    _trits(blocks, out, ((0, 32, 5), (32, 16, 5), (48, 4, 4)))


def _ptq1_0(blocks: Bytes, out: Floats) -> None:
    _trits(blocks, out, ((0, 16, 5), (16, 8, 5), (24, 2, 4)))


_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def _trits(blocks: Bytes, out: Floats, spans: tuple[tuple[int, int, int], ...]) -> None:
    """Write ternary digits times the scale at the end of the block.

    A span (start, width, digits) of bytes holds its digits one after the other: all first digits,
    then all second ones. Digit n of byte b is (b * 3^n mod 256) * 3 // 256, that is, how many of 86
    and 171 the first factor reaches.
    """
    packed = np.ascontiguousarray(blocks[:, :-2])
    digits = np.empty((len(_POWERS), *packed.shape), np.int8)
    for digit, power in zip(digits, _POWERS, strict=True):
        product = packed * power  # wraps around
        np.add((product > 85).view(np.int8), (product > 170).view(np.int8), out=digit)
    codes = np.empty(out.shape, np.int8)
    first = 0
    for start, width, count in spans:
        part = codes[:, first : first + count * width].reshape(-1, count, width)
        part[...] = digits[:count, :, start : start + width].transpose(1, 0, 2)
        first += count * width
    np.multiply(np.subtract(codes, 1, out=codes), _scale(blocks[:, -2:]), out=out)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _scale(blocks[:, :2]), out=out)


def _nibbles(packed: Bytes) -> Bytes:
    """Return (n, g, w) bytes as (n, g, 2, w): low nibbles, then high ones."""
    codes = np.empty((*packed.shape[:2], 2, packed.shape[2]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return codes


def _q4_0(blocks: Bytes, out: Floats) -> None:
    codes = _nibbles(blocks[:, None, 2:]).reshape(out.shape).view(np.int8)
    np.multiply(np.subtract(codes, 8, out=codes), _scale(blocks[:, :2]), out=out)


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """Eight sub-blocks of 32 with 6-bit scales and minima: d * scale * q - dmin * minimum."""
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    scale = _scale(blocks[:, :2]) * scales  # (n, 8)
    least = _scale(blocks[:, 2:4]) * minima
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    values = out.reshape(-1, 8, 32)
    np.multiply(codes, scale[:, :, None], out=values)
    np.subtract(values, least[:, :, None], out=values)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """Sixteen sub-blocks of 16 with 8-bit scales; four bits of a code are in ql, two in qh."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    codes = np.empty((len(blocks), 2, 4, 32), np.uint8)
    np.bitwise_and(low, 15, out=codes[:, :, :2].reshape(-1, 2, 1, 64))
    np.right_shift(low, 4, out=codes[:, :, 2:].reshape(-1, 2, 1, 64))
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> _SHIFTS[:, None]) & np.uint8(3)
    np.bitwise_or(codes, high << np.uint8(4), out=codes)
    signed = codes.view(np.int8)
    np.subtract(signed, 32, out=signed)
    scale = _scale(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)  # (n, 16)
    np.multiply(signed.reshape(-1, 16, 16), scale[:, :, None], out=out.reshape(-1, 16, 16))


_DECODERS: Mapping[str, Callable[[Bytes, Floats], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
    "Q1_0": _q1_0,
    "Q2_0": _q2_scale_first,
    "Q2_0_G128": _q2_scale_first,
    "PQ2_0": _q2_scale_first,
    "TQ2_0_G128": _q2_scale_last,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "PTQ1_0": _ptq1_0,
}
