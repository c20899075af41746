"""What others drop into a store's folder, which is named to the operator and never imported.

A store's files are written by this program alone: whatever else is there came from somebody who
expects it to be served, or by mistake.
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from bonsai_lora.formats.peft_config import CONFIG_FILE
from bonsai_lora.formats.text import printable

MOST_NAMED = 1000
_MOST_LOOKED_AT = 10_000
"""Entries of the store's folder itself; it has a dozen of its own."""
_OWN = frozenset({"sets", "tmp", "locks", "bad", "jobs", "exponents", "staged"})
_WEIGHTS = (".safetensors", CONFIG_FILE)
_FILES = (".gguf", *_WEIGHTS)
_IMPORT = "run bonsai-lora push NAME PATH, or serve with --sets for the folder around it"


@dataclass(slots=True)
class Dropped:
    """Files and folders that are not the store's."""

    count: int = 0
    names: list[str] = field(default_factory=list)
    """Up to `MOST_NAMED`, relative to the store's folder and printable; a folder's ends in '/'."""

    def add(self, folder: str, entry: "os.DirEntry[str]") -> None:
        """Count an entry, and name it if there is room; a hidden one is nobody's concern."""
        if entry.name.startswith("."):
            return
        self.count += 1
        if len(self.names) < MOST_NAMED:
            ending = "/" if _is_folder(entry) else ""
            self.names.append(printable(f"{folder}{entry.name}{ending}"))

    def plus(self, other: "Dropped") -> "Dropped":
        """Return both, sorted by name."""
        names = sorted([*self.names, *other.names])
        return Dropped(self.count + other.count, names[:MOST_NAMED])

    def advice(self) -> dict[str, str]:
        """Return what to do about each one that is named."""
        return {name: _advice(name) for name in self.names}


def dropped_beside_sets(root: Path) -> Dropped:
    """Return the adapters in the folder `root` of a store; nothing if it cannot be listed.

    Anything else there may be of a newer release, of the file system, or of a backup.
    """
    found = Dropped()
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in _looked_at(entries):
            if _is_adapter(entry):
                found.add("", entry)
    return found


def _looked_at(entries: Iterable["os.DirEntry[str]"]) -> Iterable["os.DirEntry[str]"]:
    for entry in islice(entries, _MOST_LOOKED_AT):
        if entry.name not in _OWN:
            yield entry


def _is_adapter(entry: "os.DirEntry[str]") -> bool:
    if _is_folder(entry):
        return os.path.isfile(f"{entry.path}/{CONFIG_FILE}")  # noqa: PTH113 - no Path per entry
    return entry.name.endswith(_FILES)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _advice(name: str) -> str:
    if name.endswith(_WEIGHTS):
        return (
            "it is not imported from here; move it out, into a folder with both adapter files, and "
            f"{_IMPORT}"
        )
    if name.endswith(("/", ".gguf")):
        return f"it is not imported from here; move it out, and {_IMPORT}"
    return "it is not of the store; move it out"
