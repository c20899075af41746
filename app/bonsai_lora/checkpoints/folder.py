"""Select the files of a folder that make up a base, as transformers does.

A folder without safetensors files may have a GGUF model instead.

`model.safetensors` takes precedence; without it the index decides (`from_pretrained` of
transformers 5). Other weights, such as variants, are not part of the model. Subfolders are, unless
they are models themselves. Links out of the folder are not followed, except those of a hub cache
into its `blobs`.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bonsai_lora.formats.large_json import ObjectReader
from bonsai_lora.formats.text import is_unicode

GGUF = ".gguf"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

MOST_JSON_BYTES = 1 << 26
"""Longest index and configuration that are read."""

_ONE_FILE = "model.safetensors"
_OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"})
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_DEPTH = 4
_PROJECTOR = "mmproj"
"""In the names of GGUF files with a vision tower, which llama.cpp loads beside the model."""


@dataclass(slots=True)
class FolderFiles:
    """The files of one folder: served and ignored."""

    files: dict[str, Path] = field(default_factory=dict)
    """Name relative to the folder, with `/` -> path, for each file of the model."""
    weights: set[str] = field(default_factory=set)
    """Names of the files that hold the model's tensors: safetensors, or GGUF."""
    ignored: list[str] = field(default_factory=list)
    """Names of ignored files and folders."""


def read_folder(folder: Path) -> FolderFiles:
    """Return the files of a base, sorted by name."""
    found = FolderFiles()
    ggufs: dict[str, Path] = {}
    for name, path in sorted(_walk(folder, _roots(folder), "", found.ignored)):
        if path.suffix == GGUF:
            ggufs[name] = path
        elif path.suffix in _OTHER_WEIGHTS:
            found.ignored.append(name)
        else:
            found.files[name] = path
    _choose_weights(found)
    if found.weights:
        found.ignored += ggufs
    else:
        found.weights = {name for name in ggufs if "/" not in name and _PROJECTOR not in name}
        found.files |= {name: ggufs[name] for name in sorted(found.weights)}
        found.ignored += ggufs.keys() - found.weights
    found.ignored.sort()
    return found


def _choose_weights(found: FolderFiles) -> None:
    """Keep the weights that transformers would load; move the others to `ignored`."""
    top = {name for name in found.files if "/" not in name and name.endswith(".safetensors")}
    if _ONE_FILE in top:
        found.weights = {_ONE_FILE}
        others = {*(top - found.weights), *({INDEX_FILE} & found.files.keys())}
    else:
        named = _named_by_index(found.files)
        found.weights = top if named is None else top & named
        others = top - found.weights
    for name in others:
        del found.files[name]
        found.ignored.append(name)


def _named_by_index(files: Mapping[str, Path]) -> set[str] | None:
    """Return the files that the index lists; None without a valid index."""
    try:
        return set(weight_map_of(_read(files[INDEX_FILE])).values())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def weight_map_of(index: bytes) -> dict[str, Any]:
    """Return the object `weight_map` of an index, read in pieces; raises ValueError."""
    reader = ObjectReader(index.decode())
    for name in reader.names():
        if name == "weight_map":
            return {tensor: reader.value() for tensor in reader.names()}
        reader.any_value()
    raise ValueError("there is no weight_map")


def _read(path: Path) -> bytes:
    """Return a file of JSON; raises ValueError if it is far longer than any should be."""
    with path.open("rb") as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MOST_JSON_BYTES} bytes")
    return content


def _walk(
    folder: Path, roots: tuple[Path, ...], prefix: str, ignored: list[str]
) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of each file under `folder` that may be served."""
    for entry in os.scandir(folder):
        name = f"{prefix}{entry.name}"
        if entry.name.startswith(".") or not is_unicode(entry.name):  # no URL can have the name
            continue
        path = Path(entry.path)
        if entry.is_symlink() and not _stays_inside(path, roots):
            ignored.append(name)
        elif entry.is_file():
            yield name, path
        elif entry.is_dir():
            if entry.is_symlink() or prefix.count("/") >= _DEPTH or _is_model(path):
                ignored.append(f"{name}/")
            else:
                yield from _walk(path, roots, f"{name}/", ignored)


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that links may point into."""
    own = folder.resolve()
    return (own, own.parent.parent / "blobs") if own.parent.name == "snapshots" else (own,)


def _stays_inside(path: Path, roots: tuple[Path, ...]) -> bool:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a dangling or circular link
        return False
    return any(target.is_relative_to(root) for root in roots)


def _is_model(folder: Path) -> bool:
    """Return whether a subfolder is a model: a training checkpoint, Meta's original files."""
    if _CHECKPOINT.fullmatch(folder.name) or any(folder.glob("consolidated*")):
        return True
    try:
        return "model_type" in json.loads(_read(folder / CONFIG_FILE))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
