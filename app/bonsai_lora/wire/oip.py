"""Inference requests and responses of the Open Inference Protocol v2: JSON, then binary data.

Sources: the protocol's specification (kserve/open-inference-protocol, inference_rest.md) and
Triton's extensions binary_tensor_data and shared_memory (triton-inference-server/server,
docs/protocol). Error texts are close to Triton's, because people search for those.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bonsai_lora.core.cast import Array, Floats
from bonsai_lora.errors import InvalidRequestError, MalformedBodyError, ShapeMismatchError, counted
from bonsai_lora.formats.safetensors import as_bytes
from bonsai_lora.validation import as_written
from bonsai_lora.wire import json
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.stacks import decode_weight
from bonsai_lora.wire.tensors import check_json_output

Encoded = tuple[list[bytes | memoryview], int | None]
"""A response body in parts, and the length of its JSON if binary data follows."""

_REGION = "shared_memory_region"
_REGION_OFFSET = "shared_memory_offset"
_REGION_SIZE = "shared_memory_byte_size"

_MAX_DIMENSIONS = 8
"""Bounds the cost of multiplying the dimensions of a shape."""

_SHORT_BYTES = 1 << 10
"""Parsed JSON up to this length is cached."""
_HINT = "; if binary data follows it, give its length in Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Placement:
    """The location of a tensor in a shared-memory region."""

    region: str
    offset: int
    byte_size: int


@dataclass(frozen=True, eq=False, slots=True)
class InferInput:
    """One input tensor: its bytes, its JSON list, or its location in shared memory."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: memoryview | Array | list[Any] | Placement | int
    """An int is the length of binary data that has not been sliced from the body yet."""

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class InferOutput:
    """One requested output, and how it is to be returned."""

    name: str
    is_binary: bool = False
    placed: Placement | None = None


@dataclass(frozen=True, eq=False, slots=True)
class InferRequest:
    """An inference request for one model."""

    id: str
    inputs: Mapping[str, InferInput]
    outputs: Sequence[InferOutput] | None
    """None: all outputs; `is_binary` then applies to each."""
    is_binary: bool = False
    scale: float = 1.0
    text: Buffer = b""
    """The JSON of the request, from which integers are read as they were sent."""


def decode_request(
    body: memoryview, header_length: int | None, *, may_take_long: bool = True
) -> InferRequest:
    """Decode a body whose first `header_length` bytes are JSON (None: all of it).

    Binary inputs are views of `body`. Raises the errors of `json.decode_with_arrays`,
    MalformedBodyError if JSON and binary data do not add up to the body's length,
    InvalidRequestError for missing fields or fields of the wrong type.
    """
    end = len(body) if header_length is None else header_length
    if end > len(body):
        raise MalformedBodyError(
            f"Inference-Header-Content-Length is {end}, but the body has "
            f"{counted(len(body), 'byte')}; send the length of the JSON"
        )
    text = body[:end]
    request = (
        _decode_short(bytes(text))
        if end <= _SHORT_BYTES
        else _decode_text(text, may_take_long=may_take_long)
    )
    inputs = {}
    for name, one in request.inputs.items():
        if isinstance(one.content, int):
            end, start = end + one.content, end
            if end > len(body):
                raise MalformedBodyError(
                    f"input '{name}' declares {counted(one.content, 'byte')} of binary data, but "
                    f"the body has only {len(body) - start} left; check "
                    "Inference-Header-Content-Length and each binary_data_size",
                    field=name,
                )
            one = InferInput(name, one.datatype, one.shape, body[start:end])  # noqa: PLW2901
        inputs[name] = one
    if end != len(body):
        raise MalformedBodyError(
            f"the body has {counted(len(body) - end, 'byte')} more than its inputs declare; check "
            "Inference-Header-Content-Length and each binary_data_size"
        )
    return InferRequest(
        request.id, inputs, request.outputs, request.is_binary, request.scale, request.text
    )


def _decode_text(body: memoryview | bytes, *, may_take_long: bool = True) -> InferRequest:
    """Decode the JSON of a request; the content of a binary input is its length for now."""
    fields = json.decode_with_arrays(body, "the request's JSON", _HINT, may_take_long=may_take_long)
    if not isinstance(fields, dict) or not is_list_of(dict, fields.get("inputs")):
        raise InvalidRequestError(
            "the request has no list of inputs; send a JSON object with the list 'inputs'",
            field="inputs",
        )
    inputs: dict[str, InferInput] = {}
    for one in fields["inputs"]:
        decoded = _decode_input(one)
        if decoded.name in inputs:
            raise InvalidRequestError(
                f"input '{decoded.name}' is given twice; send it once", field=decoded.name
            )
        inputs[decoded.name] = decoded
    parameters = _parameters(fields, "the request")
    is_binary = _flag(parameters, "binary_data_output", default=False)
    requested = fields.get("outputs")
    if requested and not is_list_of(dict, requested):
        raise InvalidRequestError(
            "'outputs' is invalid; expected a list of objects", field="outputs"
        )
    return InferRequest(
        _string(fields.get("id") or "", "id"),
        inputs,
        [_decode_output(one, default=is_binary) for one in requested] if requested else None,
        is_binary,
        decode_weight(parameters.get("scale", 1.0), "parameters.scale"),
        body,
    )


# Requests with the same shape from one client have the same JSON before their binary data.
_decode_short = lru_cache(maxsize=1024)(_decode_text)


def encode_response(
    model: str, version: str, request_id: str, outputs: Sequence[tuple[InferOutput, Floats]]
) -> Encoded:
    """Return a response body, and the length of its JSON if binary data follows.

    Outputs are FP32. Outputs in shared memory are described, but not included. Raises
    NonFiniteOutputError if a JSON output overflows float32.
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
    if is_list_of(int, shape) and len(shape) > _MAX_DIMENSIONS:
        raise ShapeMismatchError(
            f"unexpected shape of {counted(len(shape), 'dimension')} for input '{name}'; expected "
            "[rows, width] or [width]",
            field=name,
        )
    if not is_list_of(int, shape) or not all(0 <= one < 2**48 for one in shape):
        raise InvalidRequestError(
            f"the shape of input '{name}' is invalid; expected a list of integers from 0",
            field=name,
        )
    parameters = _parameters(value, f"input '{name}'")
    size, placed = parameters.get("binary_data_size"), _decode_placed(parameters, name)
    data = value.get("data")
    if (data is not None) + (size is not None) + (placed is not None) != 1:
        raise InvalidRequestError(
            f"input '{name}' has no data, or more than one kind; give exactly one of 'data', the "
            f"parameter 'binary_data_size' and the parameter '{_REGION}'",
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
        raise InvalidRequestError(
            f"'data' of input '{name}' is invalid; expected a list", field=name
        )
    datatype = _string(value.get("datatype"), f"the datatype of input '{name}'")
    return InferInput(name, datatype, tuple(shape), content)


def _decode_output(value: Any, *, default: bool) -> InferOutput:
    name = _string(value.get("name"), "an output's name")
    parameters = _parameters(value, f"output '{name}'")
    if parameters.get("classification"):
        raise InvalidRequestError(
            f"classification of output '{name}' is not supported; remove the parameter", field=name
        )
    placed = _decode_placed(parameters, name)
    return InferOutput(name, _flag(parameters, "binary_data", default=default), placed)


def _decode_placed(parameters: Mapping[str, Any], name: str) -> Placement | None:
    region = parameters.get(_REGION)
    if region is None:
        return None
    if "binary_data_size" in parameters:
        raise InvalidRequestError(
            f"'{name}' has both 'binary_data_size' and '{_REGION}'; give one of them", field=name
        )
    return Placement(
        _string(region, f"'{_REGION}' of '{name}'"),
        _size(parameters.get(_REGION_OFFSET, 0), _REGION_OFFSET, name),
        _size(parameters.get(_REGION_SIZE), _REGION_SIZE, name),
    )


def _parameters(value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = value.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"the parameters of {where} are invalid; expected an object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequestError(
            f"the parameter '{name}' is {as_written(value)}; expected true or false", field=name
        )
    return value


def _size(value: Any, what: str, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidRequestError(
            f"the parameter '{what}' of '{name}' is {as_written(value)}; expected a number of "
            "bytes",
            field=name,
        )
    return value


def _string(value: Any, what: str) -> str:
    if value is None:
        raise InvalidRequestError(f"{what} is missing; add it")
    if not isinstance(value, str):
        raise InvalidRequestError(f"{what} is {as_written(value)}; expected a string")
    return value


def is_list_of(kind: type, value: Any) -> bool:
    """Return whether `value` is a list of exactly `kind`."""
    return isinstance(value, list) and all(type(one) is kind for one in value)
