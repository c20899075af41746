"""The names of the sets that each worker has open, kept for when one dies.

A worker appends to a file of its own. If it dies, perhaps because touching a set's pages failed,
its supervisor keeps the file, and later workers check these sets before they serve them.
"""

import os
from collections.abc import Collection
from pathlib import Path

_OPEN, _SUSPECTS = "open-", "suspects-"
_MOST_LINES = 1 << 14


class OpenNames:
    """The file of this process in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{_OPEN}{os.getpid()}"
        self._descriptor = self._new_file()
        self._lines = 0

    def __del__(self) -> None:
        os.close(self._descriptor)

    def add(self, name: str, others: Collection[str]) -> None:
        """Note that `name` is opened while `others` are open."""
        if self._lines >= _MOST_LINES:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, "".join(f"{one}\n" for one in others).encode())
            self._lines = len(others)
        os.write(self._descriptor, f"{name}\n".encode())
        self._lines += 1

    def _new_file(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)


def suspect_sets_of(folder: Path, pid: int) -> list[str]:
    """Return the sets that the dead worker `pid` had open, and make them suspects."""
    path = folder / f"{_SUSPECTS}{pid}"
    try:
        (folder / f"{_OPEN}{pid}").rename(path)
    except FileNotFoundError:  # it died before it opened its store
        return []
    return sorted(_names_in(path))


def suspects(folder: Path) -> set[str]:
    """Return all sets that workers had open when they died."""
    return {name for path in folder.glob(f"{_SUSPECTS}*") for name in _names_in(path)}


def _names_in(path: Path) -> set[str]:
    return set(path.read_text(encoding="utf-8").splitlines())
