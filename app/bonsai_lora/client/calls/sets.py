"""Sets: create, list, show, upload, delete, export."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from bonsai_lora.client.answers import (
    Attention,
    Config,
    ExpertLayout,
    ImportReport,
    Mlp,
    SetInfo,
    SetPage,
)
from bonsai_lora.client.call import (
    Call,
    Part,
    decode_bytes,
    decode_nothing,
    decode_tagged,
    given,
    header_lines,
    json_body,
    path_of,
    query_of,
    range_of,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from bonsai_lora.client.answers import Array

_CONFIG_FILE = "adapter_config.json"
_MODEL_FILE = "adapter_model.safetensors"
_MLX_FILE = "adapters.safetensors"


class UploadOptions(TypedDict, total=False):
    """Options of an upload, which `upload_set` and `upload_gguf` describe."""

    base_model_name: str | None
    expert_b_layout: ExpertLayout | None
    architecture: str | None
    if_match: str | None
    if_none_match: str | None


def create_set(
    name: str,
    *,
    base_model_name: str | None = None,
    config: Config | None = None,
    model: str | None = None,
    attention: Attention | None = None,
    mlp: Mlp | None = None,
    num_layers: int | None = None,
) -> Call[SetInfo]:
    """Create a set with newly initialized adapters, or an empty one.

    `model` is a known model such as `qwen3-8b` and stands for `attention`, `mlp` and `num_layers`.
    Raises SetExistsError if there is a set of this name.
    """
    body = given(
        name=name,
        base_model_name=base_model_name,
        config=config,
        model=model,
        attention=attention,
        mlp=mlp,
        num_layers=num_layers,
    )
    return Call(method="POST", path="/v1/sets", decode=decode_tagged, **json_body(body))


def list_page(
    *,
    limit: int | None = None,
    cursor: str | None = None,
    base_model_name: str | None = None,
    prefix: str | None = None,
) -> Call[SetPage]:
    """Return one page of the sets by name; `list_sets` goes through all pages."""
    return Call(
        path="/v1/sets",
        query=query_of(limit=limit, cursor=cursor, base_model_name=base_model_name, prefix=prefix),
    )


def get_set(name: str, *, version: int | None = None) -> Call[SetInfo]:
    """Return everything about a set but its weights; raises SetNotFoundError.

    `version` is the one that is meant: raises VersionNotFoundError if the set has a different one.
    """
    return Call(
        path=path_of("v1", "sets", name), query=query_of(version=version), decode=decode_tagged
    )


def upload_set(
    name: str,
    folder: str | os.PathLike[str],
    **options: Unpack[UploadOptions],
) -> Call[ImportReport]:
    """Upload a PEFT or MLX adapter folder; creates the set or replaces it, in one step.

    `base_model_name` replaces the name in the adapter's configuration; `expert_b_layout` says how
    the columns of B are ordered in fused experts, if the file does not decide it. `if_match`
    replaces only the version with this ETag; `if_none_match="*"` only creates. Raises
    FileNotFoundError if a file is missing, PreconditionFailedError, InvalidAdapterError and
    UnsupportedAdapterError; the last two say what is wrong with the adapter.
    """
    files: dict[str, Part] = {
        "adapter_config": Path(folder) / _CONFIG_FILE,
        "adapter_model": _model_file(Path(folder)),
    }
    return upload_files(
        name,
        files,
        **options,
    )


def _model_file(folder: Path) -> Path:
    """Return the weights in a folder: PEFT's, or MLX's if only these are there."""
    model, mlx = folder / _MODEL_FILE, folder / _MLX_FILE
    return mlx if mlx.is_file() and not model.is_file() else model


def upload_files(
    name: str,
    files: Mapping[str, Part],
    **options: Unpack[UploadOptions],
) -> Call[ImportReport]:
    """Upload an adapter whose files are `adapter_config` and `adapter_model`.

    Each is bytes, a path, or a file opened in binary mode. Otherwise the same as `upload_set`.
    """
    return _upload(name, {"parts": files}, **options)


def pull_set(
    name: str,
    source: str,
    **options: Unpack[UploadOptions],
) -> Call[ImportReport]:
    """Make the service pull an adapter from one of its sources, such as `hub:acme/sql-lora@main`.

    Otherwise the same as `upload_set`. Raises SourceUnknownError, SourceUnreachableError.
    """
    return _upload(name, json_body({"source": source}), **options)


def _upload(
    name: str,
    sent: Mapping[str, Any],
    *,
    if_match: str | None = None,
    if_none_match: str | None = None,
    **query: str | None,
) -> Call[ImportReport]:
    conditions = header_lines(if_match=if_match, if_none_match=if_none_match)
    return Call(
        method="PUT",
        path=path_of("v1", "sets", name),
        query=query_of(**query),
        decode=decode_tagged,
        **{**sent, "headers": {**sent.get("headers", {}), **conditions}},
    )


def upload_tensors(
    name: str,
    config: Mapping[str, Any],
    tensors: "Mapping[str, npt.ArrayLike]",
    **options: Unpack[UploadOptions],
) -> Call[ImportReport]:
    """Upload an adapter from memory: PEFT's configuration, and arrays under PEFT's key names.

    Otherwise the same as `upload_set`.
    """
    from bonsai_lora.client.tensors import encode_tensors  # noqa: PLC0415 - loads NumPy

    files: dict[str, Part] = {
        "adapter_config": json.dumps(config).encode(),
        "adapter_model": encode_tensors(tensors, {"format": "pt"}),
    }
    return upload_files(
        name,
        files,
        **options,
    )


def upload_gguf(name: str, file: Part, **options: Unpack[UploadOptions]) -> Call[ImportReport]:
    """Upload a GGUF LoRA file, as llama.cpp reads it.

    `architecture` says whose tensor names it has, in place of its own. Otherwise the same as
    `upload_set`.
    """
    return upload_files(name, {"adapter_gguf": file}, **options)


def change_set(name: str, *, base_model_name: str, if_match: str | None = None) -> Call[SetInfo]:
    """Change the name of a set's base model, which makes its next version; the weights stay.

    Raises SetNotFoundError, and PreconditionFailedError for other ETags.
    """
    body = json_body({"base_model_name": base_model_name}, if_match=if_match)
    return Call(method="PATCH", path=path_of("v1", "sets", name), decode=decode_tagged, **body)


def delete_set(name: str, *, if_match: str | None = None) -> Call[None]:
    """Delete a set; raises SetNotFoundError, and PreconditionFailedError for other ETags."""
    return Call(
        method="DELETE",
        path=path_of("v1", "sets", name),
        headers=header_lines(if_match=if_match),
        decode=decode_nothing,
    )


def get_adapter_config(name: str, *, version: int | None = None) -> Call[dict[str, Any]]:
    """Return the adapter_config.json of a set as PEFT reads it; raises SetNotFoundError."""
    return Call(path=path_of("v1", "sets", name, _CONFIG_FILE), query=query_of(version=version))


def get_adapter_tensors(name: str, *, version: int | None = None) -> "Call[dict[str, Array]]":
    """Return the weights of a set under PEFT's key names, in their dtypes."""
    from bonsai_lora.client.tensors import decode_tensors  # noqa: PLC0415 - loads NumPy

    return Call(
        path=path_of("v1", "sets", name, _MODEL_FILE),
        query=query_of(version=version),
        decode=decode_tensors,
    )


def get_adapter_model(name: str, *, version: int | None = None) -> Call[bytes]:
    """Return the adapter_model.safetensors of a set, as it would be in a PEFT folder."""
    return Call(
        path=path_of("v1", "sets", name, _MODEL_FILE),
        query=query_of(version=version),
        decode=decode_bytes,
    )


def get_adapter_gguf(
    name: str,
    *,
    dtype: str | None = None,
    architecture: str | None = None,
    folded: bool = False,
    version: int | None = None,
    start: int = 0,
    stop: int | None = None,
    tag: str | None = None,
) -> Call[bytes]:
    """Return a set as a GGUF LoRA for llama.cpp, or its bytes from `start` to `stop` (exclusive).

    `dtype` is F32, F16, BF16 or Q8_0. With `tag`, an ETag without quotes, all of the file if that
    has changed. Raises UnsupportedAdapterError for a set that no GGUF LoRA can express.
    """
    return Call(
        path=path_of("v1", "sets", name, "adapter.gguf"),
        query=query_of(
            dtype=dtype, architecture=architecture, folded=folded or None, version=version
        ),
        headers=range_of(start, stop, tag),
        decode=decode_bytes,
    )
