"""Merging an adapter into weights."""

from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, BinaryIO

from bonsai_lora.client.answers import Dtype
from bonsai_lora.client.call import Call, blocks_of, decode_bytes, path_of, query_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from bonsai_lora.client.answers import Array


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


def merge_stream(
    set_name: str,
    module: str,
    weights: BinaryIO | Iterable[bytes] | AsyncIterable[bytes],
    *,
    dtype: Dtype,
    unmerge: bool = False,
    version: int | None = None,
) -> Call[bytes]:
    """Yield the merged bytes of weights that come in blocks, in constant memory.

    `weights` is a file opened in binary mode, or an iterable of bytes, of `AsyncClient` also an
    asynchronous one: W (d_out, d_in) row by row, as `dtype`. All of it is sent before the first
    block comes back. Raises as `merge`.
    """
    return Call(
        method="POST",
        path=_path(set_name, module),
        query=query_of(dtype=dtype, unmerge=unmerge or None, version=version),
        headers={"Content-Type": "application/octet-stream"},
        content=blocks_of(weights),
        decode=decode_bytes,
        is_pure=True,
    )
