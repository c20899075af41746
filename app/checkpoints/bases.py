"""Base checkpoints: folders of safetensors files, read-only, found by their name."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.core.adapter import LoraAdapter
from app.core.cast import Array, Floats, to_float32
from app.core.merge import blocks
from app.errors import BaseNotFoundError, BonsaiLoraError, InvalidBaseError
from app.formats import safetensors
from app.formats.mapped import map_file
from app.formats.names import is_set_name

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Base:
    """An opened base: its files mapped, its headers checked."""

    name: str
    folder: Path
    files: dict[str, memoryview]
    headers: dict[str, safetensors.Header]
    weight_map: dict[str, str]
    """Tensor name -> file name."""

    def tensor(self, name: str) -> Array | None:
        """Return a tensor as a read-only view of its file, None where there is none."""
        file = self.weight_map.get(name)
        if file is None:
            return None
        return safetensors.view(self.files[file], self.headers[file], name)

    def weight_of(self, module: str) -> Array | None:
        """Return the weight of a module given by its full path."""
        return self.tensor(f"{module}.weight")


class BaseFolder:
    """The folder of bases; each folder in it that holds safetensors is one, named by it."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._open: dict[str, tuple[tuple[int, ...], Base]] = {}

    def names(self) -> list[str]:
        """Return the names of all bases, sorted; a new folder is there at once."""
        if self._root is None or not self._root.is_dir():
            return []
        return sorted(
            entry.name
            for entry in os.scandir(self._root)
            if entry.is_dir() and is_set_name(entry.name) and _model_files(Path(entry.path))
        )

    def get(self, name: str) -> Base:
        """Return the base `name`, opened; its files' identities are compared at each call.

        Raises BaseNotFoundError, or InvalidBaseError where its files are no checkpoint.
        """
        if self._root is None or not is_set_name(name):
            raise BaseNotFoundError(name)
        folder = self._root / name
        files = _model_files(folder)
        if not files:
            raise BaseNotFoundError(name)
        identity = tuple(
            part
            for file in files
            for part in (file.stat().st_ino, file.stat().st_mtime_ns, file.stat().st_size)
        )
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


def row_norms(weight: Array, adapter: LoraAdapter) -> Floats:
    """Return the norms (d_out,) of the rows of W + scaling * B @ A, summed in float64.

    `weight` is (d_out, d_in), or (d_in, d_out) where the adapter's layer stores it so. The norm
    is DoRA's denominator (Liu et al. 2024, equation 5; peft 0.21, tuners/lora/dora.py).
    """
    if adapter.layer != "linear":
        weight = weight.T
    a_matrix, b_matrix = adapter.factors
    squares = np.zeros(adapter.d_out)
    for rows, columns in blocks(adapter.d_out, adapter.d_in):
        block = to_float32(np.ascontiguousarray(weight[rows, columns]))
        merged = block + np.float32(adapter.scaling) * (b_matrix[rows] @ a_matrix[:, columns])
        squares[rows] += np.einsum("ij,ij->i", merged, merged, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)


def _model_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        return [index, *sorted(folder.glob("*.safetensors"))]
    return sorted(folder.glob("*.safetensors"))


def _open(name: str, folder: Path, files: list[Path]) -> Base:
    mapped: dict[str, memoryview] = {}
    headers: dict[str, safetensors.Header] = {}
    weight_map: dict[str, str] = {}
    for path in files:
        if path.name == INDEX_FILE:
            continue
        with path.open("rb") as file:
            raw = map_file(file)
        try:
            header = safetensors.decode_header(raw)
            safetensors.check_total(header, len(raw))
        except BonsaiLoraError as error:
            raise InvalidBaseError(
                f"{path.name} of base {name!r}: {error.detail}", base=name
            ) from None
        mapped[path.name], headers[path.name] = raw, header
        for tensor in header.tensors:
            if weight_map.setdefault(tensor, path.name) != path.name:
                raise InvalidBaseError(
                    f"base {name!r} has tensor {tensor!r} in two files", base=name
                )
    _check_index(name, folder, weight_map)
    return Base(name, folder, mapped, headers, weight_map)


def _check_index(name: str, folder: Path, weight_map: dict[str, str]) -> None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    try:
        listed: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = [tensor for tensor, file in listed.items() if weight_map.get(tensor) != file]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidBaseError(f"{INDEX_FILE} of base {name!r} cannot be read", base=name) from None
    if wrong:
        raise InvalidBaseError(
            f"{INDEX_FILE} of base {name!r} names tensors that are not where it says: "
            + ", ".join(wrong[:8]),
            base=name,
        )
