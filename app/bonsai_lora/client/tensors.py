"""Arrays in calls and answers: the caller's side of `bonsai_lora.wire`.

Imported by the calls that send or return arrays when they are first made, since it loads NumPy.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from bonsai_lora.client.answers import Applied, AppliedMany, Inferred, Row
from bonsai_lora.client.call import BLOCK_BYTES, weighted
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, FLOAT32
from bonsai_lora.errors import InvalidRequestError, RaggedInputError
from bonsai_lora.formats import safetensors
from bonsai_lora.wire.binary import EXPERTS
from bonsai_lora.wire.oip_tensors import BYTES, DATATYPES, INTEGERS
from bonsai_lora.wire.stacks import SETS

Array = npt.NDArray[Any]

BINARY = "application/vnd.safetensors"
RAW = "application/octet-stream"
HEADER_LENGTH = "Inference-Header-Content-Length"

_KEPT = (FLOAT32, FLOAT16, BFLOAT16)
_DATATYPE_NAMES = {dtype: name for name, dtype in {**DATATYPES, **INTEGERS}.items()}


def _to_floats(value: npt.ArrayLike, name: str) -> Array:
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


def _to_integers(value: npt.ArrayLike, name: str) -> Array:
    """Return `value` as int64; raises InvalidRequestError for anything but integers of that."""
    array: Array = np.asarray(value)
    if array.size == 0:  # NumPy makes float64 of an empty list
        return array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.max() > np.iinfo(np.int64).max:
        raise InvalidRequestError(
            f"{name!r} is an array of {array.dtype}; expected integers below 2**63", field=name
        )
    return array.astype(np.int64)


def _to_arrays(tensors: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
    return {
        name: _to_integers(value, name) if name == EXPERTS else _to_floats(value, name)
        for name, value in tensors.items()
    }


def encode_tensors(
    tensors: Mapping[str, npt.ArrayLike], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return a safetensors body of `tensors`, `experts` as int64, all others as floats.

    float16 and bfloat16 are kept, other numbers rounded to float32. Raises InvalidRequestError for
    anything but numbers, RaggedInputError for rows of different lengths.
    """
    return safetensors.encode(_to_arrays(tensors), metadata)


def binary_body(
    tensors: Mapping[str, npt.ArrayLike], metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the fields of a call that sends tensors; values of `metadata` are sent as JSON."""
    texts = {name: json.dumps(value) for name, value in (metadata or {}).items()}
    return {
        "content": encode_tensors(tensors, texts or None),
        "headers": {"Content-Type": BINARY},
    }


def decode_tensors(answer: httpx.Response) -> dict[str, Array]:
    """Return copies of the tensors of an answer, in their dtypes."""
    return _decode(answer)[0]


def _decode(answer: httpx.Response) -> tuple[dict[str, Array], Mapping[str, str]]:
    """Return copies of the tensors of an answer, and its metadata."""
    arrays, metadata = safetensors.decode(answer.content)
    return {name: array.copy() for name, array in arrays.items()}, metadata


def decode_applied(answer: httpx.Response) -> Applied:
    """Return the one output of an apply."""
    outputs, metadata = _decode(answer)
    return Applied(outputs["outputs"], _versions(metadata))


def decode_applied_many(answer: httpx.Response) -> AppliedMany:
    """Return the outputs of an apply by module."""
    outputs, metadata = _decode(answer)
    return AppliedMany(outputs, _versions(metadata))


def _versions(metadata: Mapping[str, str]) -> dict[str, int]:
    if "versions" in metadata:
        versions: dict[str, int] = json.loads(metadata["versions"])
        return versions
    return {metadata["set"]: int(metadata["version"])}


def stack_of(sets: Mapping[str, float] | None) -> dict[str, Any]:
    """Return the metadata for further sets that all rows go through."""
    return {} if sets is None else {"sets": weighted(sets)}


def rows_of(sets: Sequence[Row]) -> list[Any]:
    """Return the JSON value of what each row goes through; raises InvalidRequestError."""
    if isinstance(sets, str | Mapping):
        raise InvalidRequestError(
            f"sets is a {type(sets).__name__}; expected a list with an entry per row",
            field="sets",
        )
    return [weighted(row) if isinstance(row, Mapping) else row for row in sets]


def inference_body(
    inputs: Mapping[str, npt.ArrayLike],
    outputs: Sequence[str] | None,
    sets: Sequence[Row] | None,
    scale: float,
    request_id: str,
) -> dict[str, Any]:
    """Return the fields of a call that infers: JSON, then the bytes of all inputs.

    `sets` is what each row of the model `mixed` goes through. Raises as `encode_tensors`.
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
    if sets is not None:
        rows = [json.dumps(one) if isinstance(one, list) else one or "" for one in rows_of(sets)]
        described.append({"name": SETS, "datatype": BYTES, "shape": [len(rows)], "data": rows})
    request: dict[str, Any] = {
        "inputs": described,
        "parameters": {"binary_data_output": True, "scale": scale},
    }
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    if request_id:
        request["id"] = request_id
    text = json.dumps(request).encode()
    return {
        "content": b"".join([text, *map(safetensors.as_bytes, arrays.values())]),
        "headers": {"Content-Type": RAW, HEADER_LENGTH: str(len(text))},
    }


def decode_inferred(answer: httpx.Response) -> Inferred:
    """Return what a model answered.

    Raises ValueError, KeyError or TypeError if the JSON does not describe the data that follow it.
    """
    body = answer.content
    start = int(answer.headers.get(HEADER_LENGTH, len(body)))
    fields, outputs = json.loads(body[:start]), {}
    for one in fields["outputs"]:
        dtype = DATATYPES[one["datatype"]]
        size = one["parameters"]["binary_data_size"]
        flat = np.frombuffer(body, dtype, size // dtype.itemsize, start)
        outputs[one["name"]] = flat.reshape(one["shape"]).copy()
        start += size
    return Inferred(fields["model_name"], fields["model_version"], outputs, fields.get("id", ""))


class Blocks:
    """Parts of a body in blocks, from the start each time it is iterated."""

    def __init__(self, parts: Sequence[bytes | memoryview]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        """Yield the blocks."""
        for part in self._parts:
            for start in range(0, len(part), BLOCK_BYTES):
                yield bytes(part[start : start + BLOCK_BYTES])


def merge_body(weights: npt.ArrayLike) -> dict[str, Any]:
    """Return the fields of a call that merges `weights`, (d_out, d_in), in their own dtype.

    A contiguous array is not copied. Raises InvalidRequestError unless it is float32, float16 or
    bfloat16.
    """
    array = np.ascontiguousarray(weights)
    if array.dtype not in _KEPT:
        raise InvalidRequestError(
            f"the weights are {array.dtype}, which would be rounded; convert them to float32, "
            "float16 or bfloat16 first",
            field="weights",
        )
    parts = safetensors.encode_parts({"weights": array})
    length = str(sum(map(len, parts)))
    return {
        "headers": {"Content-Type": BINARY, "Content-Length": length},
        "content": Blocks(parts),
    }


def decode_weights(answer: httpx.Response) -> Array:
    """Return the merged weights of an answer."""
    return decode_tensors(answer)["weights"]
