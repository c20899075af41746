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

from bonsai_lora.checkpoints.folder import INDEX_FILE, FolderFiles, read_folder
from bonsai_lora.checkpoints.paths import TensorPaths, prefixes_of
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.core.merge import blocks, merge_rows, row_squares
from bonsai_lora.errors import BaseNotFoundError, BonsaiLoraError, InvalidBaseError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.mapped import map_file
from bonsai_lora.formats.names import base_names, is_base_name

Identity = tuple[int, int, int]
"""Inode, modification time in nanoseconds, length in bytes."""

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 12
"""A base's digest covers this many pieces of each file, each of this many bytes."""


@dataclass(frozen=True, eq=False)
class Base:
    """An opened base: all files are memory-mapped, all safetensors headers checked."""

    name: str
    folder: Path
    files: Mapping[str, memoryview]
    headers: Mapping[str, safetensors.Header]
    weight_map: Mapping[str, str]
    """Tensor name -> file name."""
    identities: Mapping[str, Identity]
    """File name -> identity of the mapped file."""
    digest: str
    """Identifies the content: names, sizes, times, headers and samples of all files."""
    ignored: Sequence[str] = ()
    """Files and folders beside them that are not part of the model."""

    def info(self, name: str) -> safetensors.TensorInfo | None:
        """Return the dtype, shape and byte range of a tensor; None if it does not exist."""
        file = self.weight_map.get(name)
        return None if file is None else self.headers[file].tensors[name]

    def tensor(self, name: str) -> Array | None:
        """Return a tensor as a read-only view of its file; None if it does not exist."""
        file = self.weight_map.get(name)
        if file is None:
            return None
        return safetensors.view(self.files[file], self.headers[file], name)

    @cached_property
    def paths(self) -> TensorPaths:
        """The tensor names, searchable by the module paths of adapters."""
        return TensorPaths(self.name, self.weight_map.keys(), prefixes_of(self.model_type))

    @cached_property
    def model_type(self) -> str:
        """`model_type` of config.json; empty if unknown."""
        value = self._config.get("model_type")
        return value if isinstance(value, str) else ""

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head shares the embedding, by config.json or because there is no head."""
        return bool(
            self._config.get("tie_word_embeddings", "lm_head.weight" not in self.weight_map)
        )

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        try:
            config = json.loads(bytes(self.files["config.json"]))
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


def identity_of(status: os.stat_result) -> Identity:
    """Return what changes when the file's content changes."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def row_norms(weight: Array, adapter: LoraAdapter) -> Floats:
    """Return the norms (d_out,) of the rows of W + scaling * B @ A, summed in float64.

    `weight` is (d_out, d_in), or (d_in, d_out) for embeddings and Conv1D. The norm is the
    denominator of DoRA (Liu et al. 2024, equation 5; peft 0.21, tuners/lora/dora.py).
    """
    if adapter.layer != "linear":
        weight = weight.T
    squares = np.zeros(adapter.d_out)
    for rows, columns in blocks(adapter.d_out, adapter.d_in):
        block = to_float32(np.ascontiguousarray(weight[rows, columns]))
        merged = np.empty_like(block)
        merge_rows(block, *adapter.factors_of(rows, columns), adapter.scaling, out=merged)
        squares[rows] += row_squares(merged)
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
    mapped: dict[str, memoryview] = {}
    identities: dict[str, Identity] = {}
    digest = hashlib.sha256()
    for file, path in found.files.items():
        with path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            raw = mapped[file] = map_file(opened)
        identities[file] = identity_of(status)
        digest.update(f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
        # Reproducible image and archive builds give every file of every build the same time.
        for start in range(0, len(raw), max(_SAMPLE_BYTES, len(raw) // _SAMPLES)):
            digest.update(raw[start : start + _SAMPLE_BYTES])
    headers: dict[str, safetensors.Header] = {}
    weight_map: dict[str, str] = {}
    for file in sorted(found.weights):
        header = headers[file] = _header_of(name, file, mapped[file])
        digest.update(mapped[file][: header.data_start])
        for tensor in header.tensors:
            if weight_map.setdefault(tensor, file) != file:
                raise InvalidBaseError(
                    f"base {name!r} has tensor {tensor!r} in two files, {weight_map[tensor]} and "
                    f"{file}; keep model.safetensors or add an index",
                    base=name,
                )
    _check_index(name, mapped, weight_map)
    return Base(
        name, folder, mapped, headers, weight_map, identities, digest.hexdigest(), found.ignored
    )


def _header_of(name: str, file: str, raw: memoryview) -> safetensors.Header:
    try:
        header = safetensors.decode_header(raw)
        safetensors.check_total(header, len(raw))
    except BonsaiLoraError as error:
        raise InvalidBaseError(f"{file} of base {name!r}: {error.detail}", base=name) from None
    return header


def _check_index(name: str, files: dict[str, memoryview], weight_map: dict[str, str]) -> None:
    if INDEX_FILE not in files:
        return
    try:
        listed: Any = json.loads(bytes(files[INDEX_FILE]))["weight_map"]
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
