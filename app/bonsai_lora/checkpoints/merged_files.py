"""The files of a merged model, computed while they are read and never stored.

A merged safetensors file has the header, sizes and offsets of its base file; only the bytes of
changed tensors differ. Of a GGUF base there are a merged GGUF file, and the same model as a Hugging
Face checkpoint.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from bonsai_lora.checkpoints.gguf_base import GgufBase
from bonsai_lora.checkpoints.hugging_face import checkpoint_files
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.merged_gguf import merged_gguf
from bonsai_lora.checkpoints.parts import (
    Computed,
    MergedFile,
    Part,
    Stored,
    etag_of,
    media_type_of,
)
from bonsai_lora.checkpoints.safetensors_base import SafetensorsBase
from bonsai_lora.errors import InvalidRequestError, UnsupportedGgufError

GGUF_DTYPES = ("F16", "BF16", "F32", "Q8_0")
SAFETENSORS_DTYPES = ("BF16", "F16", "F32")
"""Dtypes of merged files of a GGUF base, the default first."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """How the merged files of a GGUF base are written."""

    dtype: str | None = None
    """Dtype of changed tensors; None for each format's default."""
    is_widened: bool = False
    """Whether all other quantized tensors of a GGUF file are written in this dtype, too."""


DEFAULT = Rendering()


def merged_files(model: MergedModel, rendering: Rendering = DEFAULT) -> Mapping[str, MergedFile]:
    """Return the files of a merged model by name, in order of their names.

    Raises InvalidRequestError if the base has a dtype of its own and one is given,
    UnsupportedGgufError if a tensor cannot be read or written in the dtype.
    """
    base = model.base
    if isinstance(base, GgufBase):
        return _of_gguf(model, base, rendering)
    if rendering != DEFAULT:
        raise InvalidRequestError(
            f"base {base.name!r} is a safetensors checkpoint, whose merged files keep its dtypes; "
            "leave out dtype and widen",
            field="dtype" if rendering.dtype else "widen",
        )
    assert isinstance(base, SafetensorsBase)
    return {name: _like_base(model, base, name) for name in sorted(base.files)}


def _of_gguf(model: MergedModel, base: GgufBase, rendering: Rendering) -> dict[str, MergedFile]:
    files: dict[str, MergedFile] = {}
    if rendering.dtype in (None, *SAFETENSORS_DTYPES):
        with suppress(UnsupportedGgufError):  # its tensors have no names or values there
            files = checkpoint_files(model, base, rendering.dtype, needs_config=False)
    dtype = rendering.dtype or GGUF_DTYPES[0]
    gguf = merged_gguf(model, base, dtype, is_widened=rendering.is_widened)
    files[f"{base.name}.gguf"] = gguf
    return dict(sorted(files.items()))


def hub_files(model: MergedModel) -> Mapping[str, MergedFile]:
    """Return the files that Hugging Face clients load: no GGUF file."""
    base = model.base
    return (
        dict(sorted(checkpoint_files(model, base, None, needs_config=True).items()))
        if isinstance(base, GgufBase)
        else merged_files(model)
    )


def _like_base(model: MergedModel, base: SafetensorsBase, name: str) -> MergedFile:
    """Return a file that differs from the base's only in changed tensors."""
    file, header = base.files[name], base.headers.get(name)
    position = 0
    parts: list[Part] = []
    if header is not None:
        for tensor, info in header.tensors.items():
            if tensor in model.changes:
                merged = model.tensor(tensor)
                parts.append(Stored(file, position, header.data_start + info.start))
                parts.append(Computed(merged, merged.dtype.itemsize.__mul__))
                position = header.data_start + info.stop
    parts.append(Stored(file, position, file.size_bytes))
    digest = model.digest if header else base.digest
    return MergedFile(parts, etag_of(f"{digest}/{name}"), media_type_of(name))
