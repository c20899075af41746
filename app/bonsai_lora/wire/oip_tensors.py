"""The tensors of inference requests: from JSON lists or bytes to arrays and strings."""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from bonsai_lora.core.batch import Integers
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, FLOAT32, Array, Floats, to_float32
from bonsai_lora.errors import InvalidRequestError, MalformedBodyError, ShapeMismatchError
from bonsai_lora.wire import json
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.finite import check_finite
from bonsai_lora.wire.oip import InferInput, Placement, is_list_of
from bonsai_lora.wire.tensors import decode_experts

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": FLOAT32,
    "FP16": FLOAT16,
    "BF16": BFLOAT16,
    "FP64": np.dtype(np.float64),
}
INTEGERS: Mapping[str, np.dtype[Any]] = {
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
}
BYTES = "BYTES"

_BINARY_ONLY = ("FP16", "BF16")


def check_floats(tensor: InferInput) -> np.dtype[Any]:
    """Return the dtype of a numeric tensor, without reading its data.

    Raises InvalidRequestError for any other datatype, ShapeMismatchError unless it has one or two
    dimensions and the length of its data fits its shape.
    """
    dtype = DATATYPES.get(tensor.datatype)
    if dtype is None:
        raise _wrong_datatype(tensor, "'FP32' or 'FP64', or in binary also 'FP16' or 'BF16'")
    if len(tensor.shape) not in (1, 2):
        raise _wrong_shape(tensor, "[rows, width] or [width]")
    _check_size(tensor, dtype)
    return dtype


def decode_floats(tensor: InferInput, content: memoryview | Array | list[Any]) -> Floats:
    """Return a numeric tensor as float32 in its own shape, (width,) or (rows, width).

    Raises the errors of `check_floats`, ShapeMismatchError if a JSON list has a different shape,
    NonFiniteInputError.
    """
    name, shape = tensor.name, tensor.shape
    dtype = check_floats(tensor)
    if not isinstance(content, memoryview):
        return _from_json(tensor, content)
    floats = to_float32(np.frombuffer(content, dtype).reshape(shape))
    check_finite(floats, name)
    return floats


def decode_integers(
    tensor: InferInput, content: memoryview | Array | list[Any], text: Buffer
) -> Integers:
    """Return the tensor `experts` (rows,).

    `text` is the JSON of the request. Raises InvalidRequestError for any datatype but INT32 and
    INT64 and for JSON other than a list of integers, ShapeMismatchError if the data does not fit
    the shape.
    """
    name, shape = tensor.name, tensor.shape
    dtype = INTEGERS.get(tensor.datatype)
    if dtype is None:
        raise _wrong_datatype(tensor, "'INT32' or 'INT64'")
    if len(shape) != 1:
        raise _wrong_shape(tensor, "[rows]")
    _check_size(tensor, dtype)
    if isinstance(content, memoryview):
        return np.frombuffer(content, dtype).astype(np.int64)
    numbers = decode_experts(_list_of(name, text))
    if numbers is None or len(numbers) != shape[0]:
        raise ShapeMismatchError(
            f"input '{name}' has data of length {0 if numbers is None else len(numbers)}, but its "
            f"shape is {format_shape(shape)}; make them agree",
            field=name,
        )
    return numbers


def decode_strings(tensor: InferInput, content: memoryview | Array | list[Any]) -> list[str]:
    """Return the elements of a BYTES tensor of shape (n,) or (n, 1).

    Raises InvalidRequestError for any other datatype, MalformedBodyError for invalid data,
    ShapeMismatchError for the wrong number of elements.
    """
    name = tensor.name
    if tensor.datatype != BYTES:
        raise _wrong_datatype(tensor, "'BYTES'")
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ((), (1,)):
        raise _wrong_shape(tensor, "[rows]")
    count = tensor.shape[0]
    found = (
        _binary_strings(content, name, count + 1)
        if isinstance(content, memoryview)
        else _json_strings(content, name)
    )
    if len(found) != count:
        got = str(len(found)) if len(found) < count else f"more than {count}"
        raise ShapeMismatchError(
            f"input '{name}' has {got} elements, but its shape is {format_shape(tensor.shape)}; "
            "send as many as the shape says",
            field=name,
        )
    return found


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as Triton writes it."""
    return f"[{','.join(map(str, shape))}]"


def _wrong_datatype(tensor: InferInput, expected: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"inference input '{tensor.name}' data-type is '{tensor.datatype}'; expected {expected}",
        field=tensor.name,
    )


def _wrong_shape(tensor: InferInput, expected: str) -> ShapeMismatchError:
    return ShapeMismatchError(
        f"unexpected shape {format_shape(tensor.shape)} for input '{tensor.name}'; expected "
        f"{expected}",
        field=tensor.name,
    )


def _check_size(tensor: InferInput, dtype: np.dtype[Any]) -> None:
    """Raise ShapeMismatchError if bytes, in the body or in shared memory, do not fit the shape."""
    content = tensor.content
    if not isinstance(content, memoryview | Placement):
        return
    expected = math.prod(tensor.shape) * dtype.itemsize
    got = content.byte_size if isinstance(content, Placement) else len(content)
    if got != expected:
        raise ShapeMismatchError(
            f"input byte size mismatch for input '{tensor.name}'. Expected {expected} for shape "
            f"{format_shape(tensor.shape)} of {tensor.datatype}, got {got}",
            field=tensor.name,
        )


def _list_of(name: str, text: Buffer) -> Any:
    """Return the JSON data of an input as it was sent; parsed requests have float32 arrays."""
    inputs = json.decode(text)["inputs"]
    return next(one["data"] for one in inputs if one["name"] == name)


def _from_json(tensor: InferInput, content: Array | list[Any]) -> Floats:
    name = tensor.name
    if tensor.datatype in _BINARY_ONLY:
        raise InvalidRequestError(
            f"receiving {tensor.datatype} data via JSON is not supported. Please use the binary "
            f"data format for input '{name}'",
            field=name,
        )
    floats = json.decode_tensor(content, name)
    flat = floats.ndim == 1 and floats.size == math.prod(tensor.shape)
    if not flat and floats.shape != tensor.shape:
        raise ShapeMismatchError(
            f"input '{name}' has data of shape {format_shape(floats.shape)}, but its shape is "
            f"{format_shape(tensor.shape)}; make them agree",
            field=name,
        )
    return floats.reshape(tensor.shape)


def _json_strings(content: Array | list[Any], name: str) -> list[str]:
    flat = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in content]
    if not is_list_of(str, flat):
        raise InvalidRequestError(
            f"the data of input '{name}' is not all strings; expected a list of strings",
            field=name,
        )
    return flat


def _binary_strings(content: memoryview, name: str, most: int) -> list[str]:
    """Return at most `most` strings, each preceded by its length in four bytes."""
    found: list[str] = []
    start = 0
    try:
        while start < len(content) and len(found) < most:
            (length,) = struct.unpack_from("<I", content, start)
            start += 4 + length
            if start > len(content):
                raise MalformedBodyError(
                    f"a string of input '{name}' is truncated; send all of its bytes", field=name
                )
            found.append(str(content[start - length : start], "utf-8"))
    except struct.error:
        raise MalformedBodyError(
            f"the length of a string of input '{name}' is truncated; send it in four bytes",
            field=name,
        ) from None
    except UnicodeDecodeError:
        raise MalformedBodyError(
            f"a string of input '{name}' is not UTF-8; encode it as UTF-8", field=name
        ) from None
    return found
