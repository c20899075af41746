"""Infer requests and responses of the Open Inference Protocol v2: JSON, with binary data behind it.

Sources: the protocol's specification (kserve/open-inference-protocol, inference_rest.md) and
Triton's extensions binary_tensor_data and shared_memory (triton-inference-server/server,
docs/protocol). The words of refusals are close to Triton's, since people search for those.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from bonsai_lora.core.cast import BFLOAT16, FLOAT16, FLOAT32, Array, Floats, to_float32
from bonsai_lora.errors import InvalidRequestError, MalformedBodyError, ShapeMismatchError
from bonsai_lora.formats.safetensors import as_bytes
from bonsai_lora.wire import json
from bonsai_lora.wire.finite import check_finite
from bonsai_lora.wire.stacks import decode_weight
from bonsai_lora.wire.tensors import check_json_output

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": FLOAT32,
    "FP16": FLOAT16,
    "BF16": BFLOAT16,
    "FP64": np.dtype(np.float64),
}
BYTES = "BYTES"

Encoded = tuple[list[bytes | memoryview], int | None]
"""A response's body in parts, and the length of its JSON where binary data follow."""

_REGION = "shared_memory_region"
_REGION_OFFSET = "shared_memory_offset"
_REGION_SIZE = "shared_memory_byte_size"

_MAX_DIMENSIONS = 8
"""So that no product of a shape takes long."""

_SHORT_BYTES = 1 << 10
"""JSON up to this length is remembered."""
_BINARY_ONLY = ("FP16", "BF16")
_HINT = " (where binary data follow it, its length must be in Inference-Header-Content-Length)"


@dataclass(frozen=True, slots=True)
class Placement:
    """Bytes of a tensor in a shared-memory region."""

    region: str
    offset: int
    byte_size: int


@dataclass(frozen=True, eq=False, slots=True)
class InferInput:
    """One input tensor: its bytes, its JSON list, or its place in shared memory."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: memoryview | Array | list[Any] | Placement | int
    """An int stands for as many bytes behind the JSON, before these are known."""

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class InferOutput:
    """One output that is asked for, and where it goes."""

    name: str
    is_binary: bool = False
    placed: Placement | None = None


@dataclass(frozen=True, eq=False, slots=True)
class InferRequest:
    """What a client asks of one model."""

    id: str
    inputs: Mapping[str, InferInput]
    outputs: Sequence[InferOutput] | None
    """None: all, in the form that `is_binary` says."""
    is_binary: bool = False
    scale: float = 1.0
    text: json.Text = field(default_factory=lambda: json.Text(b""))
    """Its JSON, which is asked whether booleans are among the numbers."""


def decode_request(body: memoryview, header_length: int | None) -> InferRequest:
    """Return the request of a body whose first `header_length` bytes are JSON (None: all of it).

    The data of binary inputs are views of `body`. Raises MalformedJsonError, MalformedBodyError
    where header and data do not make up the body exactly, InvalidRequestError for fields that are
    missing or of the wrong kind.
    """
    end = len(body) if header_length is None else header_length
    if end > len(body):
        raise MalformedBodyError(
            f"Inference-Header-Content-Length is {end}, but the body has {len(body)} bytes"
        )
    text = body[:end]
    request = _decode_short(bytes(text)) if end <= _SHORT_BYTES else _decode_text(text)
    inputs = {}
    for name, one in request.inputs.items():
        if isinstance(one.content, int):
            end, start = end + one.content, end
            if end > len(body):
                raise MalformedBodyError(
                    f"input '{name}' says that it has {one.content} bytes of binary data, but the "
                    f"body has {len(body) - start} left behind the JSON; is "
                    "Inference-Header-Content-Length right?",
                    field=name,
                )
            one = InferInput(name, one.datatype, one.shape, body[start:end])  # noqa: PLW2901
        inputs[name] = one
    if end != len(body):
        raise MalformedBodyError(
            f"the body has {len(body) - end} bytes more than its inputs describe; check "
            "Inference-Header-Content-Length and each binary_data_size"
        )
    return InferRequest(
        request.id, inputs, request.outputs, request.is_binary, request.scale, request.text
    )


def _decode_text(body: memoryview | bytes) -> InferRequest:
    """Return what the JSON of a request says; binary inputs have the length of their data."""
    text = json.Text(body)
    fields = json.decode_with_arrays(text.body, "the request's JSON", _HINT)
    if not isinstance(fields, dict) or not _is_list_of(dict, fields.get("inputs")):
        raise InvalidRequestError(
            "the request must be a JSON object with the list 'inputs'", field="inputs"
        )
    inputs: dict[str, InferInput] = {}
    for one in fields["inputs"]:
        decoded = _decode_input(one)
        if decoded.name in inputs:
            raise InvalidRequestError(f"input '{decoded.name}' is given twice", field=decoded.name)
        inputs[decoded.name] = decoded
    parameters = _parameters(fields, "the request")
    is_binary = _flag(parameters, "binary_data_output", default=False)
    asked = fields.get("outputs")
    if asked and not _is_list_of(dict, asked):
        raise InvalidRequestError("'outputs' must be a list of objects", field="outputs")
    return InferRequest(
        _string(fields.get("id") or "", "id"),
        inputs,
        [_decode_output(one, default=is_binary) for one in asked] if asked else None,
        is_binary,
        decode_weight(parameters.get("scale", 1.0), "parameters.scale"),
        text,
    )


# A client's requests of one shape have the same JSON before their binary data.
_decode_short = lru_cache(maxsize=1024)(_decode_text)


def check_floats(tensor: InferInput) -> np.dtype[Any]:
    """Return the dtype of a tensor of numbers, before anything of it is read.

    Raises InvalidRequestError for another datatype, ShapeMismatchError where it has not one or two
    dimensions, or its bytes are not as many as its shape says.
    """
    name, shape = tensor.name, tensor.shape
    dtype = DATATYPES.get(tensor.datatype)
    if dtype is None:
        raise InvalidRequestError(
            f"inference input '{name}' data-type is '{tensor.datatype}', expected 'FP32' (or "
            "'FP64'; in binary also 'FP16', 'BF16')",
            field=name,
        )
    if len(shape) not in (1, 2):
        raise ShapeMismatchError(
            f"unexpected shape {text_of(shape)} for input '{name}'; expected [rows, width] or "
            "[width]",
            field=name,
        )
    content = tensor.content
    if isinstance(content, memoryview | Placement):
        expected = math.prod(shape) * dtype.itemsize
        got = content.byte_size if isinstance(content, Placement) else len(content)
        if got != expected:
            raise ShapeMismatchError(
                f"input byte size mismatch for input '{name}'. Expected {expected} for shape "
                f"{text_of(shape)} of {tensor.datatype}, got {got}",
                field=name,
            )
    return dtype


def decode_floats(
    tensor: InferInput, content: memoryview | Array | list[Any], text: json.Text
) -> Floats:
    """Return a tensor as float32 of its own shape, (width,) or (rows, width).

    `text` is the JSON of the request. Raises as `check_floats`, ShapeMismatchError where a JSON
    list has another shape, NonFiniteInputError.
    """
    name, shape = tensor.name, tensor.shape
    dtype = check_floats(tensor)
    if not isinstance(content, memoryview):
        return _from_json(tensor, content, text)
    floats = to_float32(np.frombuffer(content, dtype).reshape(shape))
    check_finite(floats, name)
    return floats


def decode_strings(tensor: InferInput, content: memoryview | Array | list[Any]) -> list[str]:
    """Return the elements of a BYTES tensor of shape (n,) or (n, 1).

    Raises InvalidRequestError for another datatype or broken text, ShapeMismatchError for another
    number of elements.
    """
    name = tensor.name
    if tensor.datatype != BYTES:
        raise InvalidRequestError(
            f"inference input '{name}' data-type is '{tensor.datatype}', expected 'BYTES'",
            field=name,
        )
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ((), (1,)):
        raise ShapeMismatchError(
            f"unexpected shape {text_of(tensor.shape)} for input '{name}'; expected [rows]",
            field=name,
        )
    count = tensor.shape[0]
    found = (
        _binary_strings(content, name, count + 1)
        if isinstance(content, memoryview)
        else _json_strings(content, name)
    )
    if len(found) != count:
        got = str(len(found)) if len(found) < count else f"more than {count}"
        raise ShapeMismatchError(
            f"input '{name}' has {got} elements, but its shape is {text_of(tensor.shape)}",
            field=name,
        )
    return found


def encode_response(
    model: str, version: str, request_id: str, outputs: Sequence[tuple[InferOutput, Floats]]
) -> Encoded:
    """Return a response's body, and the length of its JSON where binary data follows.

    Outputs are FP32. One that is placed in shared memory is only described. Raises
    NonFiniteOutputError where JSON cannot carry a sum that overflowed.
    """
    described = []
    data: list[memoryview] = []
    for wanted, array in outputs:
        entry: dict[str, Any] = {
            "name": wanted.name,
            "datatype": "FP32",
            "shape": list(array.shape),
        }
        if wanted.placed is not None:
            entry["parameters"] = {
                _REGION: wanted.placed.region,
                _REGION_OFFSET: wanted.placed.offset,
                _REGION_SIZE: array.nbytes,
            }
        elif wanted.is_binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            data.append(as_bytes(array))
        else:
            check_json_output(wanted.name, array)
            entry["data"] = array.reshape(-1)
        described.append(entry)
    fields = {"model_name": model, "model_version": version, "outputs": described}
    text = json.encode({"id": request_id, **fields} if request_id else fields)
    return [*text, *data], sum(map(len, text)) if data else None


def _decode_input(value: Any) -> InferInput:
    name = _string(value.get("name"), "an input's name")
    shape = value.get("shape")
    if _is_list_of(int, shape) and len(shape) > _MAX_DIMENSIONS:
        raise ShapeMismatchError(
            f"unexpected shape of {len(shape)} dimensions for input '{name}'; expected "
            "[rows, width] or [width]",
            field=name,
        )
    if not _is_list_of(int, shape) or not all(0 <= one < 2**48 for one in shape):
        raise InvalidRequestError(
            f"the shape of input '{name}' must be a list of whole numbers from 0",
            field=name,
        )
    parameters = _parameters(value, f"input '{name}'")
    size, placed = parameters.get("binary_data_size"), _decode_placed(parameters, name)
    data = value.get("data")
    if (data is not None) + (size is not None) + (placed is not None) != 1:
        raise InvalidRequestError(
            f"input '{name}' must have exactly one of 'data', the parameter 'binary_data_size' and "
            f"the parameter '{_REGION}'",
            field=name,
        )
    content: Array | list[Any] | Placement | int
    if placed is not None:
        content = placed
    elif size is not None:
        content = _size(size, "binary_data_size", name)
    elif isinstance(data, list | np.ndarray):
        content = data
    else:
        raise InvalidRequestError(f"'data' of input '{name}' must be a list", field=name)
    datatype = _string(value.get("datatype"), f"the datatype of input '{name}'")
    return InferInput(name, datatype, tuple(shape), content)


def _decode_output(value: Any, *, default: bool) -> InferOutput:
    name = _string(value.get("name"), "an output's name")
    parameters = _parameters(value, f"output '{name}'")
    if parameters.get("classification"):
        raise InvalidRequestError(f"classification of output '{name}' is not supported", field=name)
    placed = _decode_placed(parameters, name)
    return InferOutput(name, _flag(parameters, "binary_data", default=default), placed)


def _decode_placed(parameters: Mapping[str, Any], name: str) -> Placement | None:
    region = parameters.get(_REGION)
    if region is None:
        return None
    if "binary_data_size" in parameters:
        raise InvalidRequestError(
            f"'{name}' must not have both 'binary_data_size' and '{_REGION}'", field=name
        )
    return Placement(
        _string(region, f"'{_REGION}' of '{name}'"),
        _size(parameters.get(_REGION_OFFSET, 0), _REGION_OFFSET, name),
        _size(parameters.get(_REGION_SIZE), _REGION_SIZE, name),
    )


def _from_json(tensor: InferInput, content: Array | list[Any], text: json.Text) -> Floats:
    name = tensor.name
    if tensor.datatype in _BINARY_ONLY:
        raise InvalidRequestError(
            f"receiving {tensor.datatype} data via JSON is not supported. Please use the binary "
            f"data format for input '{name}'",
            field=name,
        )
    floats = json.decode_tensor(content, name, text)
    flat = floats.ndim == 1 and floats.size == math.prod(tensor.shape)
    if not flat and floats.shape != tensor.shape:
        raise ShapeMismatchError(
            f"input '{name}' has data of shape {text_of(floats.shape)}, but its shape is "
            f"{text_of(tensor.shape)}",
            field=name,
        )
    return floats.reshape(tensor.shape)


def _json_strings(content: Array | list[Any], name: str) -> list[str]:
    flat = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in content]
    if not _is_list_of(str, flat):
        raise InvalidRequestError(f"the data of input '{name}' must be strings", field=name)
    return flat


def _binary_strings(content: memoryview, name: str, most: int) -> list[str]:
    """Return at most so many strings, each behind its length in four bytes."""
    found: list[str] = []
    start = 0
    try:
        while start < len(content) and len(found) < most:
            (length,) = struct.unpack_from("<I", content, start)
            start += 4 + length
            if start > len(content):
                raise MalformedBodyError(f"a string of input '{name}' is cut off", field=name)
            found.append(str(content[start - length : start], "utf-8"))
    except struct.error:
        raise MalformedBodyError(f"a string's length in '{name}' is cut off", field=name) from None
    except UnicodeDecodeError:
        raise MalformedBodyError(f"a string of input '{name}' is not UTF-8", field=name) from None
    return found


def text_of(shape: tuple[int, ...]) -> str:
    """Return a shape as Triton writes it."""
    return f"[{','.join(map(str, shape))}]"


def _parameters(value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = value.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"the parameters of {where} must be an object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"the parameter '{name}' must be true or false", field=name)
    return value


def _size(value: Any, what: str, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidRequestError(
            f"the parameter '{what}' of '{name}' must be a number of bytes from 0", field=name
        )
    return value


def _string(value: Any, what: str) -> str:
    if value is None:
        raise InvalidRequestError(f"{what} is missing")
    if not isinstance(value, str):
        raise InvalidRequestError(f"{what} must be a string")
    return value


def _is_list_of(kind: type, value: Any) -> bool:
    """Return whether `value` is a list of exactly `kind`."""
    return isinstance(value, list) and all(type(one) is kind for one in value)
