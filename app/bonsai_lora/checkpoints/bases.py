"""Base checkpoints: read-only folders of safetensors files, looked up by name."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bonsai_lora.checkpoints.file import BaseFile, StoredTensor
from bonsai_lora.checkpoints.folder import INDEX_FILE, FolderFiles, read_folder
from bonsai_lora.checkpoints.paths import TensorPaths, prefixes_of
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.core.merge import blocks, merge_rows
from bonsai_lora.errors import BaseNotFoundError, BonsaiLoraError, InvalidBaseError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.identity import identity_of
from bonsai_lora.formats.names import base_names, is_base_name

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 12
"""A base's digest covers this many pieces of each file, each of this many bytes."""


@dataclass(frozen=True, eq=False)
class Base:
    """An opened base: all files are open, all safetensors headers checked."""

    name: str
    folder: Path
    files: Mapping[str, BaseFile]
    headers: Mapping[str, safetensors.Header]
    weight_map: Mapping[str, str]
    """Tensor name -> file name."""
    digest: str
    """Identifies the content: names, sizes, times, headers and samples of all files."""
    ignored: Sequence[str] = ()
    """Files and folders beside them that are not part of the model."""

    def info(self, name: str) -> safetensors.TensorInfo | None:
        """Return the dtype, shape and byte range of a tensor; None if it does not exist."""
        file = self.weight_map.get(name)
        return None if file is None else self.headers[file].tensors[name]

    def tensor(self, name: str) -> StoredTensor | None:
        """Return a tensor, not read yet; None if it does not exist.

        Raises InvalidRequestError for a dtype outside FLOAT_DTYPES.
        """
        file = self.weight_map.get(name)
        if file is None:
            return None
        header = self.headers[file]
        info = header.tensors[name]
        dtype = safetensors.float_dtype(header, name)
        return StoredTensor(self.files[file], header.data_start + info.start, dtype, info.shape)

    @cached_property
    def paths(self) -> TensorPaths:
        """The tensor names, searchable by the module paths of adapters."""
        return TensorPaths(self.name, self.weight_map.keys(), prefixes_of(self.model_type))

    @cached_property
    def model_type(self) -> str:
        """`model_type` of config.json; empty if unknown."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else ""

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head shares the embedding, by config.json or because there is no head."""
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.weight_map))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The object in config.json; empty if there is none, or it is malformed."""
        try:
            config = json.loads(_content(self.files["config.json"]))
        except (KeyError, ValueError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}

    @cached_property
    def parameters(self) -> Mapping[str, int]:
        """Number of parameters by dtype."""
        counts: Counter[str] = Counter()
        for header in self.headers.values():
            for info in header.tensors.values():
                counts[info.dtype] += math.prod(info.shape)
        return counts


class BaseFolder:
    """The folder of bases; each subfolder with safetensors files is a base with its name."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._open: dict[str, tuple[object, Base]] = {}

    def names(self) -> list[str]:
        """Return the sorted names of all bases; new folders appear immediately."""
        if self._root is None or not self._root.is_dir():
            return []
        return sorted(
            entry.name
            for entry in os.scandir(self._root)
            if entry.is_dir() and is_base_name(entry.name) and _has_weights(Path(entry.path))
        )

    def get(self, name: str) -> Base:
        """Return the base `name`, opened again if the identity of a file has changed.

        Raises BaseNotFoundError, or InvalidBaseError if its files are not a checkpoint.
        """
        if self._root is None or not is_base_name(name):
            raise BaseNotFoundError(name)
        folder = self._root / name
        if not _has_weights(folder):
            self._open.pop(name, None)
            raise BaseNotFoundError(name)
        found = read_folder(folder)
        identity = {file: identity_of(path.stat()) for file, path in found.files.items()}
        known = self._open.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        base = _open(name, folder, found)
        self._open[name] = (identity, base)
        return base

    def find(self, base_model_name: str) -> Base | None:
        """Return the base named by `base_model_name` or a part of that path; None if none is."""
        for name in base_names(base_model_name):
            try:
                return self.get(name)
            except BaseNotFoundError:
                continue
        return None


def row_norms(weight: Array | StoredTensor, adapter: LoraAdapter) -> Floats:
    """Return the norms (d_out,) of the rows of W + scaling * B @ A, summed in float64.

    `weight` is (d_out, d_in), or (d_in, d_out) for embeddings and Conv1D. The norm is the
    denominator of DoRA (Liu et al. 2024, equation 5; peft 0.21, tuners/lora/dora.py).
    """
    squares = np.zeros(adapter.d_out)
    axis = 1 if adapter.layer == "linear" else 0
    for block in blocks(*weight.shape):
        values = to_float32(np.ascontiguousarray(weight[block]))
        merged = np.empty_like(values)
        merge_rows(values, *adapter.stored_factors_of(*block), adapter.scaling, out=merged)
        squares[block[1 - axis]] += np.square(merged, dtype=np.float64).sum(axis)
    return np.sqrt(squares).astype(np.float32)


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.glob("*.safetensors"))


def _open(name: str, folder: Path, found: FolderFiles) -> Base:
    if not found.weights:
        raise InvalidBaseError(
            f"base {name!r} has no usable weights; ignored were "
            f"{', '.join(found.ignored[:8])}. Links out of the folder are not followed; copy or "
            "mount the files",
            base=name,
        )
    files: dict[str, BaseFile] = {}
    digest = hashlib.sha256()
    for file, path in found.files.items():
        opened = files[file] = BaseFile(name, file, path)
        size = opened.size_bytes
        digest.update(f"{file}\n{size}\n{opened.modified_ns}\n".encode())
        # Reproducible image and archive builds give every file of every build the same time.
        for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
            digest.update(opened.read(start, min(start + _SAMPLE_BYTES, size)))
    headers: dict[str, safetensors.Header] = {}
    weight_map: dict[str, str] = {}
    for file in sorted(found.weights):
        header = headers[file] = _header_of(name, file, files[file])
        digest.update(files[file].read(0, header.data_start))
        for tensor in header.tensors:
            if weight_map.setdefault(tensor, file) != file:
                raise InvalidBaseError(
                    f"base {name!r} has tensor {tensor!r} in two files, {weight_map[tensor]} and "
                    f"{file}; keep model.safetensors or add an index",
                    base=name,
                )
    _check_index(name, files, weight_map)
    return Base(name, folder, files, headers, weight_map, digest.hexdigest(), found.ignored)


def _content(file: BaseFile) -> bytes:
    return bytes(file.read(0, file.size_bytes))


def _header_of(name: str, file: str, opened: BaseFile) -> safetensors.Header:
    size = opened.size_bytes
    try:
        length = safetensors.header_length(opened.read(0, min(8, size)))
        header = safetensors.decode_header(opened.read(0, min(8 + length, size)))
        safetensors.check_total(header, size)
    except BonsaiLoraError as error:
        raise InvalidBaseError(f"{file} of base {name!r}: {error.detail}", base=name) from None
    return header


def _check_index(name: str, files: dict[str, BaseFile], weight_map: dict[str, str]) -> None:
    if INDEX_FILE not in files:
        return
    try:
        listed: Any = json.loads(_content(files[INDEX_FILE]))["weight_map"]
        wrong = [tensor for tensor, file in listed.items() if weight_map.get(tensor) != file]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidBaseError(
            f"{INDEX_FILE} of base {name!r} is not a valid index; download it again or remove it",
            base=name,
        ) from None
    if wrong:
        raise InvalidBaseError(
            f"{INDEX_FILE} of base {name!r} lists tensors that are not in the named files: "
            f"{', '.join(wrong[:8])}; download the missing files or remove the index",
            base=name,
        )
