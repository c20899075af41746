"""Arrays in calls and answers.

Imported by the calls that send or return arrays when they are first made, since it loads NumPy.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy.typing as npt

from bonsai_lora.client.answers import Applied, AppliedMany, Inferred, Row
from bonsai_lora.client.call import BLOCK_BYTES, weighted
from bonsai_lora.errors import InvalidRequestError
from bonsai_lora.wire import requests

Array = npt.NDArray[Any]

BINARY = "application/vnd.safetensors"
RAW = "application/octet-stream"
HEADER_LENGTH = "Inference-Header-Content-Length"


def binary_body(
    tensors: Mapping[str, npt.ArrayLike], metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the fields of a call that sends tensors; values of `metadata` are sent as JSON."""
    texts = {name: json.dumps(value) for name, value in (metadata or {}).items()}
    return {
        "content": requests.encode_tensors(tensors, texts or None),
        "headers": {"Content-Type": BINARY},
    }


def decode_tensors(answer: httpx.Response) -> dict[str, Array]:
    """Return the tensors of an answer."""
    return requests.decode_tensors(answer.content)[0]


def decode_applied(answer: httpx.Response) -> Applied:
    """Return the one output of an apply."""
    outputs, metadata = requests.decode_tensors(answer.content)
    return Applied(outputs["outputs"], _versions(metadata))


def decode_applied_many(answer: httpx.Response) -> AppliedMany:
    """Return the outputs of an apply by module."""
    outputs, metadata = requests.decode_tensors(answer.content)
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
    return [requests.encode_row(row) for row in sets]


def inference_body(
    inputs: Mapping[str, npt.ArrayLike],
    outputs: Sequence[str] | None,
    sets: Sequence[Row] | None,
    scale: float,
    request_id: str,
) -> dict[str, Any]:
    """Return the fields of a call that infers."""
    body, length = requests.encode_inference(inputs, outputs, sets, scale, request_id)
    return {"content": body, "headers": {"Content-Type": RAW, HEADER_LENGTH: str(length)}}


def decode_inferred(answer: httpx.Response) -> Inferred:
    """Return what a model answered."""
    content = answer.content
    length = int(answer.headers.get(HEADER_LENGTH, len(content)))
    fields, outputs = requests.decode_inference(content, length)
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
    """Return the fields of a call that merges `weights`, (d_out, d_in)."""
    parts = requests.encode_weights(weights)
    length = str(sum(map(len, parts)))
    return {
        "headers": {"Content-Type": BINARY, "Content-Length": length},
        "content": Blocks(parts),
    }


def decode_weights(answer: httpx.Response) -> Array:
    """Return the merged weights of an answer."""
    return decode_tensors(answer)["weights"]
