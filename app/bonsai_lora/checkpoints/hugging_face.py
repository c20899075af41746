"""A model of a GGUF file as a Hugging Face checkpoint, computed while it is read."""

import json
import zlib
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from functools import partial
from math import prod
from typing import Any

from bonsai_lora.checkpoints.folder import CONFIG_FILE, GGUF, INDEX_FILE
from bonsai_lora.checkpoints.gguf_base import GgufBase
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.parts import (
    Made,
    MergedFile,
    Part,
    Stored,
    computed_as,
    etag_of,
    media_type_of,
)
from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.dequantize import can_dequantize
from bonsai_lora.formats.gguf_config import ROPE_TABLES, config_of, weights_fields
from bonsai_lora.formats.gguf_names import HEAD
from bonsai_lora.formats.gguf_types import BY_NAME

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one file, as `save_pretrained` splits them."""

_Shapes = Mapping[str, tuple[int, ...]]


def checkpoint_files(
    model: MergedModel, base: GgufBase, dtype: str | None, *, needs_config: bool
) -> dict[str, MergedFile]:
    """Return the files of the checkpoint by name: weights in `dtype` (BF16), configuration, others.

    Raises UnsupportedGgufError if a tensor has no name or no values in such a checkpoint, and if it
    `needs_config` and no configuration can be made.
    """
    kind = dtype or "BF16"
    config: Mapping[str, Any] = {}
    with nullcontext() if needs_config else suppress(UnsupportedGgufError):
        config = _config_of(model, base, kind)
    shapes = _shapes_of(model, base, ROPE_TABLES if config else frozenset())
    shards = _shards(shapes, kind)
    seed = f"{model.digest}/{kind}"
    files = {
        name: _same_file(base, name, Stored(file, 0, file.size_bytes))
        for name, file in base.files.items()
        if not name.endswith(GGUF)
    }
    for name, (size, compressed) in base.tokenizer.items():
        made = Made(size, partial(zlib.decompress, compressed))
        files.setdefault(name, _same_file(base, name, made))
    for name, part in shards.items():
        files[name] = _weights(model, part, kind, f"{seed}/{name}")
    if len(shards) > 1:
        files[INDEX_FILE] = _json_file(_index(shards, kind), f"{seed}/{INDEX_FILE}")
    if config:
        files[CONFIG_FILE] = _json_file(config, f"{seed}/{CONFIG_FILE}")
    return files


def _config_of(model: MergedModel, base: GgufBase, dtype: str) -> Mapping[str, Any]:
    """Return the configuration beside the GGUF file, or one made from its keys."""
    is_tied = base.is_tied and not model.is_untied
    if not base.config:
        return config_of(base.header, base.file.read_at, dtype=dtype, is_tied=is_tied)
    return {**base.config, **weights_fields(dtype, is_tied=is_tied)}


def _shapes_of(model: MergedModel, base: GgufBase, left_out: frozenset[str]) -> _Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, stored in base.header.tensors.items():
        held = base.places_in(name)
        if name in left_out:
            continue
        if not held or not can_dequantize(stored.type):
            what = f"has type {stored.type.name}" if held else "has no name there"
            raise UnsupportedGgufError(
                f"base {base.name!r} cannot be a Hugging Face checkpoint: its tensor {name!r} "
                f"{what}; pull it as a GGUF file",
                tensor=name,
            )
        shapes |= {theirs: base.info(theirs).shape for theirs, _ in held}
    if model.is_untied:
        shapes[HEAD] = base.info(HEAD).shape
    return shapes


def _shards(shapes: _Shapes, dtype: str) -> Mapping[str, _Shapes]:
    """Divide the tensors, in their order, among files of at most SHARD_BYTES."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = BY_NAME[dtype].bytes_of(prod(shape))
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": one
        for number, one in enumerate(shards, 1)
    }


def _weights(model: MergedModel, shapes: _Shapes, dtype: str, seed: str) -> MergedFile:
    layout = {name: (dtype, shape) for name, shape in shapes.items()}

    def head() -> bytes:
        return safetensors.encode_header(layout, {"format": "pt"})

    parts: list[Part] = [Made(len(head()), head)]
    parts += [computed_as(dtype, model.values(name)) for name in shapes]
    return MergedFile(parts, etag_of(seed), "application/octet-stream")


def _index(shards: Mapping[str, _Shapes], dtype: str) -> object:
    total = sum(prod(shape) for one in shards.values() for shape in one.values())
    return {
        "metadata": {"total_size": BY_NAME[dtype].bytes_of(total)},
        "weight_map": {name: file for file, one in shards.items() for name in one},
    }


def _json_file(value: object, seed: str) -> MergedFile:
    raw = json.dumps(value, indent=2).encode() + b"\n"
    return MergedFile([Made(len(raw), lambda: raw)], etag_of(seed), "application/json")


def _same_file(base: GgufBase, name: str, content: Part) -> MergedFile:
    """Return a file that no set changes."""
    return MergedFile([content], etag_of(f"{base.digest}/{name}"), media_type_of(name))
