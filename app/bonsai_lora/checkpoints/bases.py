"""Base checkpoints: folders of safetensors files, read-only, found by their name."""

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

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.core.merge import blocks, merge_rows, row_squares
from bonsai_lora.errors import BaseNotFoundError, BonsaiLoraError, InvalidBaseError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.mapped import map_file
from bonsai_lora.formats.names import is_set_name

INDEX_FILE = "model.safetensors.index.json"

Identity = tuple[int, int, int]
"""Inode, time of change in nanoseconds, length."""

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 12
"""So many pieces of each file, of so many bytes, are in a base's digest."""

_OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"})


@dataclass(frozen=True, eq=False)
class Base:
    """An opened base: all its files mapped, the headers of the safetensors among them checked."""

    name: str
    folder: Path
    files: Mapping[str, memoryview]
    headers: Mapping[str, safetensors.Header]
    weight_map: Mapping[str, str]
    """Tensor name -> file name."""
    identities: Mapping[str, Identity]
    """File name -> identity when it was mapped."""
    digest: str
    """Stands for the content: names, sizes, times, headers and samples of all files."""

    def info(self, name: str) -> safetensors.TensorInfo | None:
        """Return dtype, shape and place of a tensor, None where there is none."""
        file = self.weight_map.get(name)
        return None if file is None else self.headers[file].tensors[name]

    def tensor(self, name: str) -> Array | None:
        """Return a tensor as a read-only view of its file, None where there is none."""
        file = self.weight_map.get(name)
        if file is None:
            return None
        return safetensors.view(self.files[file], self.headers[file], name)

    def weights_of(self, module: str) -> Sequence[str]:
        """Return the names of the weights of a module: by its full path, or by its last parts."""
        exact = f"{module}.weight"
        return (exact,) if exact in self.weight_map else self._by_ending.get(f".{exact}", ())

    @cached_property
    def _by_ending(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for name in self.weight_map:
            for place, letter in enumerate(name):
                if letter == ".":
                    found.setdefault(name[place:], []).append(name)
        return found

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head is the embedding: config.json says so, or there is no head."""
        try:
            config = json.loads(bytes(self.files["config.json"]))
        except (KeyError, ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            config = {}
        return bool(config.get("tie_word_embeddings", "lm_head.weight" not in self.weight_map))

    @cached_property
    def parameters(self) -> Mapping[str, int]:
        """Number of parameters by dtype."""
        counts: Counter[str] = Counter()
        for header in self.headers.values():
            for info in header.tensors.values():
                counts[info.dtype] += math.prod(info.shape)
        return counts


class BaseFolder:
    """The folder of bases; each folder in it that holds safetensors is one, named by it."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._open: dict[str, tuple[object, Base]] = {}

    def names(self) -> list[str]:
        """Return the names of all bases, sorted; a new folder is there at once."""
        if self._root is None or not self._root.is_dir():
            return []
        return sorted(
            entry.name
            for entry in os.scandir(self._root)
            if entry.is_dir() and is_set_name(entry.name) and _has_weights(Path(entry.path))
        )

    def get(self, name: str) -> Base:
        """Return the base `name`, opened; its files' identities are compared at each call.

        Raises BaseNotFoundError, or InvalidBaseError where its files are no checkpoint.
        """
        if self._root is None or not is_set_name(name):
            raise BaseNotFoundError(name)
        folder = self._root / name
        if not _has_weights(folder):
            self._open.pop(name, None)
            raise BaseNotFoundError(name)
        files = _served_files(folder)
        identity = {path.name: identity_of(path.stat()) for path in files}
        known = self._open.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        base = _open(name, folder, files)
        self._open[name] = (identity, base)
        return base

    def find(self, base_model_name: str) -> Base | None:
        """Return the base that a set names: by its whole name, or the last part of its path."""
        for name in dict.fromkeys(
            (base_model_name, base_model_name.rstrip("/").rpartition("/")[2])
        ):
            try:
                return self.get(name)
            except BaseNotFoundError:
                continue
        return None


def identity_of(status: os.stat_result) -> Identity:
    """Return what tells two contents of a file apart."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def row_norms(weight: Array, adapter: LoraAdapter) -> Floats:
    """Return the norms (d_out,) of the rows of W + scaling * B @ A, summed in float64.

    `weight` is (d_out, d_in), or (d_in, d_out) where the adapter's layer stores it so. The norm
    is DoRA's denominator (Liu et al. 2024, equation 5; peft 0.21, tuners/lora/dora.py).
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


def _served_files(folder: Path) -> list[Path]:
    """Return the files of a base, sorted; where there is an index, only weights that it names."""
    files = [path for path in sorted(folder.iterdir()) if _is_served(path)]
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        named = set(index.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return files
    return [path for path in files if path.suffix != ".safetensors" or path.name in named]


def _is_served(path: Path) -> bool:
    """Whether a file is part of the base: not hidden, and no weights in a form we do not merge."""
    try:
        path.name.encode()
    except UnicodeEncodeError:  # no request can name it
        return False
    return path.is_file() and not path.name.startswith(".") and path.suffix not in _OTHER_WEIGHTS


def _open(name: str, folder: Path, files: list[Path]) -> Base:
    mapped: dict[str, memoryview] = {}
    headers: dict[str, safetensors.Header] = {}
    weight_map: dict[str, str] = {}
    identities: dict[str, Identity] = {}
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            raw = mapped[path.name] = map_file(file)
        identities[path.name] = identity_of(status)
        digest.update(f"{path.name}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
        # Images and archives that are built reproducibly give every file of every build one time.
        for start in range(0, len(raw), max(_SAMPLE_BYTES, len(raw) // _SAMPLES)):
            digest.update(raw[start : start + _SAMPLE_BYTES])
        if path.suffix != ".safetensors":
            continue
        try:
            header = headers[path.name] = safetensors.decode_header(raw)
            safetensors.check_total(header, len(raw))
        except BonsaiLoraError as error:
            raise InvalidBaseError(
                f"{path.name} of base {name!r}: {error.detail}", base=name
            ) from None
        digest.update(raw[: header.data_start])
        for tensor in header.tensors:
            if weight_map.setdefault(tensor, path.name) != path.name:
                raise InvalidBaseError(
                    f"base {name!r} has tensor {tensor!r} in two files", base=name
                )
    _check_index(name, mapped, weight_map)
    return Base(name, folder, mapped, headers, weight_map, identities, digest.hexdigest())


def _check_index(name: str, files: dict[str, memoryview], weight_map: dict[str, str]) -> None:
    if INDEX_FILE not in files:
        return
    try:
        listed: Any = json.loads(bytes(files[INDEX_FILE]))["weight_map"]
        wrong = [tensor for tensor, file in listed.items() if weight_map.get(tensor) != file]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidBaseError(f"{INDEX_FILE} of base {name!r} cannot be read", base=name) from None
    if wrong:
        raise InvalidBaseError(
            f"{INDEX_FILE} of base {name!r} names tensors that are not where it says: "
            + ", ".join(wrong[:8]),
            base=name,
        )
