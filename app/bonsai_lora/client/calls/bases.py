"""Bases and merged files."""

from typing import Any, Unpack

from bonsai_lora.client.answers import BaseInfo, BaseList, MergedFile, PulledFile
from bonsai_lora.client.call import (
    Call,
    MixOptions,
    Query,
    decode_bytes,
    decode_field,
    mix_query,
    path_of,
    query_of,
    range_of,
)


class FilesOptions(MixOptions, total=False):
    """Options of the files of a merged model, which `list_merged_files` describes."""

    dtype: str | None
    widen: str | None


def list_bases() -> Call[BaseList]:
    """Return the base checkpoints, and why other folders are none."""
    return Call(path="/v1/bases")


def get_base(name: str) -> Call[BaseInfo]:
    """Return a base checkpoint; raises BaseNotFoundError, InvalidBaseError."""
    return Call(path=path_of("v1", "bases", name))


def list_merged_files(
    base: str, set_name: str, **options: Unpack[FilesOptions]
) -> Call[list[MergedFile]]:
    """Return the files of a merged model with their sizes and ETags; nothing is computed.

    `scale` weighs the set's deltas, and `sets` merges further sets in, each with its weight.
    `match` is the start of the tensors' names that are meant, if a module path fits several.
    `dtype` (F16, BF16, F32, Q8_0) is the type of changed tensors of a GGUF base, and
    `widen="all"` that of all other quantized tensors of the GGUF file, too.
    """
    return Call(
        path=path_of("v1", "bases", base, "merged", set_name),
        query=_query(**options),
        decode=decode_field("files"),
    )


def get_merged_file(
    base: str,
    set_name: str,
    filename: str,
    *,
    start: int = 0,
    stop: int | None = None,
    tag: str | None = None,
    **options: Unpack[FilesOptions],
) -> Call[bytes]:
    """Return a file of a merged model, or its bytes from `start` to `stop` (exclusive).

    Only these bytes are computed. With `tag`, an ETag without quotes, all of the file if that has
    changed. `options` are those of `list_merged_files`. Raises FileNotInModelError,
    RangeNotSatisfiableError.
    """
    return Call(
        path=path_of("v1", "bases", base, "merged", set_name, *filename.split("/")),
        query=_query(**options),
        headers=range_of(start, stop, tag),
        decode=decode_bytes,
    )


def stream_merged_file(
    base: str,
    set_name: str,
    filename: str,
    *,
    start: int = 0,
    stop: int | None = None,
    **options: Unpack[FilesOptions],
) -> Call[bytes]:
    """Yield a file of a merged model in blocks. Otherwise the same as `get_merged_file`."""
    return get_merged_file(base, set_name, filename, start=start, stop=stop, **options)


def get_repository(model: str) -> Call[dict[str, Any]]:
    """Return what the Hugging Face hub's protocol says of BASE/SET or adapters/SET."""
    return Call(path=path_of("api", "models", *model.split("/")))


def list_repository(model: str, commit: str) -> Call[list[PulledFile]]:
    """Return the files of BASE/SET or adapters/SET at a commit."""
    return Call(path=path_of("api", "models", *model.split("/"), "tree", commit))


def resolve(model: str, commit: str, filename: str, *, start: int, tag: str) -> Call[bytes]:
    """Return the rest of a file at a commit, from `start` if it still has this tag, else all."""
    return Call(
        path=path_of(*model.split("/"), "resolve", commit, *filename.split("/")),
        headers=range_of(start, None, tag),
        decode=decode_bytes,
    )


def _query(
    *, dtype: str | None = None, widen: str | None = None, **mix: Unpack[MixOptions]
) -> Query:
    return [*mix_query(**mix), *query_of(dtype=dtype, widen=widen)]
