"""Merging an adapter into weights."""

from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING

from bonsai_lora.client.answers import Dtype
from bonsai_lora.client.call import Call, decode_bytes, path_of, query_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from bonsai_lora.client.answers import Array

_RAW = {"Content-Type": "application/octet-stream"}


def _path(set_name: str, module: str) -> str:
    return path_of("v1", "sets", set_name, "adapters", module, "merge")


def merge(
    set_name: str,
    module: str,
    weights: "npt.ArrayLike",
    *,
    unmerge: bool = False,
    version: int | None = None,
) -> "Call[Array]":
    """Return W + scaling · B·A for W (d_out, d_in), in the dtype of W: float32, float16, bfloat16.

    The sum is made in float32 and rounded once, to nearest even. `unmerge` subtracts. Raises
    VersionNotFoundError if the set has a different `version`, ShapeMismatchError,
    InvalidRequestError for other dtypes.
    """
    from bonsai_lora.client import tensors  # noqa: PLC0415 - loads NumPy

    return Call(
        method="POST",
        path=_path(set_name, module),
        query=query_of(unmerge=unmerge or None, version=version),
        decode=tensors.decode_weights,
        is_pure=True,
        **tensors.merge_body(weights),
    )


def merge_blocks(
    set_name: str,
    module: str,
    blocks: Iterable[bytes] | AsyncIterable[bytes],
    dtype: Dtype,
    *,
    unmerge: bool,
    version: int | None = None,
) -> Call[bytes]:
    """Return the call that streams row-major bytes of W; its body can be read once."""
    return Call(
        method="POST",
        path=_path(set_name, module),
        query=query_of(dtype=dtype, unmerge=unmerge or None, version=version),
        headers=_RAW,
        content=blocks,
        decode=decode_bytes,
        is_pure=True,
        is_one_shot=True,
    )
