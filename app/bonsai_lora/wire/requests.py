"""The caller's side of `tensors` and `oip`: arrays to request bodies, answers to arrays."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.cast import BFLOAT16, FLOAT16, FLOAT32, Array
from bonsai_lora.errors import InvalidRequestError, RaggedInputError
from bonsai_lora.formats import safetensors
from bonsai_lora.wire.binary import EXPERTS
from bonsai_lora.wire.oip_tensors import BYTES, DATATYPES, INTEGERS
from bonsai_lora.wire.stacks import SETS

_KEPT = (FLOAT32, FLOAT16, BFLOAT16)
_DATATYPE_NAMES = {dtype: name for name, dtype in {**DATATYPES, **INTEGERS}.items()}


def to_floats(value: npt.ArrayLike, name: str) -> Array:
    """Return `value` as float32, float16 or bfloat16; other numbers are rounded to float32.

    Numbers beyond float32 become infinite, which the service refuses with their position. Raises
    InvalidRequestError for anything but numbers, RaggedInputError for rows of different lengths.
    """
    try:
        array: Array = np.asarray(value)
    except ValueError:
        raise RaggedInputError(
            f"{name!r} has rows of different lengths; send rows of equal length", field=name
        ) from None
    if array.dtype in _KEPT:
        return array
    if array.dtype.kind not in "fiu":
        raise InvalidRequestError(
            f"{name!r} is an array of {array.dtype}; expected numbers", field=name
        )
    with np.errstate(over="ignore"):
        return array.astype(FLOAT32)


def encode_tensors(
    tensors: Mapping[str, npt.ArrayLike], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return a safetensors body of `tensors`, `experts` as int64; raises as `to_floats`."""
    return safetensors.encode(_to_arrays(tensors), metadata)


def _to_arrays(tensors: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
    return {
        name: to_integers(value, name) if name == EXPERTS else to_floats(value, name)
        for name, value in tensors.items()
    }


def to_integers(value: npt.ArrayLike, name: str) -> Array:
    """Return `value` as int64; raises InvalidRequestError for anything but integers of that."""
    array: Array = np.asarray(value)
    if array.size == 0:  # NumPy makes float64 of an empty list
        return array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.max() > np.iinfo(np.int64).max:
        raise InvalidRequestError(
            f"{name!r} is an array of {array.dtype}; expected integers below 2**63", field=name
        )
    return array.astype(np.int64)


def decode_tensors(body: bytes) -> tuple[dict[str, Array], Mapping[str, str]]:
    """Return copies of the tensors of a safetensors body in their dtypes, and its metadata."""
    arrays, metadata = safetensors.decode(body)
    return {name: array.copy() for name, array in arrays.items()}, metadata


def encode_weights(value: npt.ArrayLike) -> list[bytes | memoryview]:
    """Return a safetensors body with the tensor `weights` in its own dtype, in parts.

    A contiguous array is not copied. Raises InvalidRequestError unless it is float32, float16 or
    bfloat16.
    """
    array = np.ascontiguousarray(value)
    if array.dtype not in _KEPT:
        raise InvalidRequestError(
            f"the weights are {array.dtype}, which would be rounded; convert them to float32, "
            "float16 or bfloat16 first",
            field="weights",
        )
    return safetensors.encode_parts({"weights": array})


def encode_inference(
    inputs: Mapping[str, npt.ArrayLike],
    outputs: Sequence[str] | None,
    rows: Sequence[Any] | None,
    scale: float,
    request_id: str,
) -> tuple[bytes, int]:
    """Return the body of an inference with binary tensors, and the length of its JSON.

    `rows` has the JSON value of what each row of the model `mixed` goes through: a name, a list of
    weighted sets, or None. The input `experts` is sent as int64. Raises as `to_floats`.
    """
    arrays = _to_arrays(inputs)
    described = [
        {
            "name": name,
            "datatype": _DATATYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in arrays.items()
    ]
    if rows is not None:
        texts = [json.dumps(row) if isinstance(row, list) else row or "" for row in rows]
        described.append({"name": SETS, "datatype": BYTES, "shape": [len(texts)], "data": texts})
    request: dict[str, Any] = {
        "inputs": described,
        "parameters": {"binary_data_output": True, "scale": scale},
    }
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    if request_id:
        request["id"] = request_id
    text = json.dumps(request).encode()
    return b"".join([text, *map(safetensors.as_bytes, arrays.values())]), len(text)


def decode_inference(body: bytes, header_length: int) -> tuple[Mapping[str, Any], dict[str, Array]]:
    """Return the fields of the response in `body`, and its outputs by name.

    The first `header_length` bytes are JSON.

    Raises ValueError, KeyError or TypeError if it does not describe the binary data that follow.
    """
    fields = json.loads(body[:header_length])
    outputs, start = {}, header_length
    for one in fields["outputs"]:
        dtype = DATATYPES[one["datatype"]]
        size = one["parameters"]["binary_data_size"]
        flat = np.frombuffer(body, dtype, size // dtype.itemsize, start)
        outputs[one["name"]] = flat.reshape(one["shape"]).copy()
        start += size
    return fields, outputs
