"""Tensors as safetensors bodies, decoded without copies."""

from collections.abc import Mapping

import numpy as np

from bonsai_lora.core import backend
from bonsai_lora.core.batch import Integers
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.errors import (
    MalformedSafetensorsError,
    ShapeMismatchError,
    TakesLongError,
    counted,
)
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.dtypes import FLOAT_DTYPES, INTEGER_DTYPES
from bonsai_lora.wire.finite import check_finite

_LONG_HEADER_BYTES = 1 << 16
"""Parsing a longer header takes milliseconds."""
_MOST_TENSORS = 1 << 16
"""Most tensors of a request."""

EXPERTS = "experts"
"""Tensor or field with the number of the expert of each row."""


def decode_batch(
    body: bytes | memoryview, max_header_bytes: int, *, may_take_long: bool = True
) -> tuple[dict[str, Floats], dict[str, str], Integers | None]:
    """Return the tensors of `body` by name, its metadata, and the tensor `experts` (rows,).

    Tensors are float32 (width,) or (rows, width); aligned F32 tensors are views of `body`. The
    tensor `experts` is I32 or I64; one of floats is decoded like any other. Raises the errors of
    `safetensors.decode`, ShapeMismatchError for a different number of dimensions,
    NonFiniteInputError for NaN or infinity, and TakesLongError for a long header, unless it
    `may_take_long`.
    """
    _check_start(body)
    if not may_take_long and int.from_bytes(body[:8], "little") > _LONG_HEADER_BYTES:
        raise TakesLongError
    header = safetensors.decode_header(body, limit=max_header_bytes, most=_MOST_TENSORS)
    safetensors.check_total(header, len(body))
    names, numbers = list(header.tensors), None
    info = header.tensors.get(EXPERTS)
    if info is not None and info.dtype in INTEGER_DTYPES:
        names.remove(EXPERTS)
        numbers = _experts(body, header)
    tensors = {name: _checked(safetensors.view(body, header, name), name) for name in names}
    return tensors, dict(header.metadata), numbers


def _experts(body: bytes | memoryview, header: safetensors.Header) -> Integers:
    shape = header.tensors[EXPERTS].shape
    if len(shape) != 1:
        raise ShapeMismatchError(
            f"tensor {EXPERTS!r} has shape {list(shape)}; expected (rows,)",
            field=EXPERTS,
            got=list(shape),
            expected=["rows"],
        )
    return safetensors.view(body, header, EXPERTS, INTEGER_DTYPES).astype(np.int64)


def _check_start(body: bytes | memoryview) -> None:
    """Raise MalformedSafetensorsError for JSON, and for less than the length of a header."""
    start = bytes(body[:8])
    if len(start) < 8:  # curl's -d ends a file at its first zero byte
        raise MalformedSafetensorsError(
            f"the body has {counted(len(start), 'byte')}, too few for safetensors; send all bytes "
            "of the file (with curl, --data-binary, as -d changes them)"
        )
    if start[:1] == b"{" and int.from_bytes(start, "little") > len(body):
        raise MalformedSafetensorsError(
            "the body looks like JSON, but its Content-Type is that of safetensors; send it with "
            "Content-Type: application/json"
        )


def _checked(array: Array, name: str) -> Floats:
    if array.ndim not in (1, 2):
        raise ShapeMismatchError(
            f"tensor {name!r} has shape {list(array.shape)}; expected (width,) or (rows, width)",
            field=name,
            got=list(array.shape),
            expected=["rows", "width"],
        )
    floats = to_float32(array)
    check_finite(floats, name)
    return floats


def encode_tensors(
    tensors: Mapping[str, Floats], dtype: str, metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """Return a safetensors body of `tensors`, in parts, as F32, F16 or BF16.

    F16 and BF16 are rounded to nearest even; F32 is not copied.
    """
    target = FLOAT_DTYPES[dtype]
    if dtype == "F32":
        return safetensors.encode_parts(tensors, metadata)
    rounded = {name: np.empty(array.shape, target) for name, array in tensors.items()}
    for name, array in tensors.items():
        backend.cast(np.ascontiguousarray(array), rounded[name])
    return safetensors.encode_parts(rounded, metadata)
