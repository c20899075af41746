"""Base checkpoints by name: folders of safetensors files, and GGUF files.

The parts of a split GGUF file, NAME-00001-of-00003.gguf and so on, are the base NAME.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from bonsai_lora.checkpoints.base import Base
from bonsai_lora.checkpoints.file import BaseFile
from bonsai_lora.checkpoints.folder import GGUF, FolderFiles, read_folder
from bonsai_lora.checkpoints.gguf_base import open_gguf
from bonsai_lora.checkpoints.gguf_split import model_of
from bonsai_lora.checkpoints.safetensors_base import open_safetensors
from bonsai_lora.errors import BaseNotFoundError, InvalidBaseError
from bonsai_lora.formats.identity import identity_of
from bonsai_lora.formats.names import base_names, is_base_name

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 12
"""A base's digest covers this many pieces of each file, each of this many bytes."""


class BaseFolder:
    """The folder of bases: subfolders with safetensors files or a GGUF model, and GGUF models."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._open: dict[str, tuple[object, Base]] = {}

    def names(self) -> list[str]:
        """Return the sorted names of all bases; new ones appear immediately."""
        if self._root is None or not self._root.is_dir():
            return []
        return sorted({name for name in _names_in(self._root) if is_base_name(name)})

    def get(self, name: str) -> Base:
        """Return the base `name`, opened again if the identity of a file has changed.

        Raises BaseNotFoundError, or InvalidBaseError if its files are not a checkpoint.
        """
        found = self._find(name)
        if found is None:
            self._open.pop(name, None)
            raise BaseNotFoundError(name)
        identity = {file: identity_of(path.stat()) for file, path in found.files.items()}
        known = self._open.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        base = _open(name, found)
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

    def _find(self, name: str) -> FolderFiles | None:
        if self._root is None or not is_base_name(name):
            return None
        folder, file = self._root / name, self._root / f"{name}{GGUF}"
        is_folder = _has_weights(folder)
        if is_folder and file.is_file():
            raise InvalidBaseError(
                f"base {name!r} is both a folder and the file {file.name}; rename one of them",
                base=name,
            )
        if is_folder:
            return read_folder(folder)
        files = [file] if file.is_file() else _parts_of(self._root, name)
        found = {one.name: one for one in sorted(files)}
        return FolderFiles(found, {*found}) if found else None


def _parts_of(root: Path, name: str) -> list[Path]:
    entries = root.iterdir() if root.is_dir() else ()
    return [path for path in entries if model_of(path.name) == name and path.is_file()]


def _names_in(root: Path) -> Iterator[str]:
    for entry in os.scandir(root):
        if entry.name.endswith(GGUF) and entry.is_file():
            yield model_of(entry.name) or entry.name.removesuffix(GGUF)
        elif entry.is_dir() and _has_weights(Path(entry.path)):
            yield entry.name


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(
        path.suffix in (".safetensors", GGUF) and path.is_file() for path in folder.iterdir()
    )


def _open(name: str, found: FolderFiles) -> Base:
    if not found.weights:
        raise InvalidBaseError(
            f"base {name!r} has no usable weights; ignored were "
            f"{', '.join(found.ignored[:8])}. Links out of the folder are not followed; copy or "
            "mount the files",
            base=name,
        )
    files = {file: BaseFile(name, file, path) for file, path in found.files.items()}
    digest = _digest_of(files)
    ggufs = sorted(file for file in found.weights if file.endswith(GGUF))
    if not ggufs:
        return open_safetensors(name, found, files, digest)
    if len(ggufs) > 1 and (len({*map(model_of, ggufs)}) > 1 or model_of(ggufs[0]) is None):
        raise InvalidBaseError(
            f"base {name!r} has {len(ggufs)} GGUF files: {', '.join(ggufs[:8])}; give each a "
            "folder of its own",
            base=name,
        )
    return open_gguf(name, ggufs, files, found.ignored, digest)


def _digest_of(files: Mapping[str, BaseFile]) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for file, opened in files.items():
        size = opened.size_bytes
        digest.update(f"{file}\n{size}\n{opened.modified_ns}\n".encode())
        # Reproducible image and archive builds give every file of every build the same time.
        for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
            digest.update(opened.read(start, min(start + _SAMPLE_BYTES, size)))
    return digest
