"""Set files that cannot be read: moved to a folder with their reasons, or remembered."""

import contextlib
import os
import secrets
from itertools import islice
from pathlib import Path

_REASON = ".reason"


class BadFiles:
    """The unreadable files of a store: those in `folder`, and those that could not be moved there.

    Thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left: dict[str, tuple[Path, str]] = {}
        """Path and reason, by set name, of files that are still where they were."""

    def note(self, name: str, path: Path, reason: str) -> None:
        """Remember the file of a set as unreadable, as long as it exists."""
        self._left[name] = path, reason

    def forget(self, name: str) -> None:
        """Forget what was noted about a set."""
        self._left.pop(name, None)

    def move(self, name: str, path: Path, reason: str) -> None:
        """Move the file of a set to the folder; raises OSError."""
        self._folder.mkdir(exist_ok=True)
        target = f"{name}.{secrets.token_hex(4)}"
        path.rename(self._folder / f"{target}{path.suffix}")
        (self._folder / f"{target}{_REASON}").write_text(reason, encoding="utf-8")

    def reasons(self, most: int | None = None) -> dict[str, str]:
        """Return the reasons, by set name, of up to `most` files that still exist."""
        found = {name: reason for name, (_, reason) in islice(self._existing().items(), most)}
        for path in self._moved()[: None if most is None else most - len(found)]:
            with contextlib.suppress(FileNotFoundError):
                found[_name_of(path)] = path.read_text(encoding="utf-8")
        return found

    def count(self) -> int:
        """Return the number of sets with such files."""
        return len({*self._existing(), *map(_name_of, self._moved())})

    def _existing(self) -> dict[str, tuple[Path, str]]:
        for name, (path, _) in self._left.copy().items():
            if not os.path.lexists(path):
                self.forget(name)
        return self._left.copy()

    def _moved(self) -> list[Path]:
        return sorted(self._folder.glob(f"*{_REASON}")) if self._folder.is_dir() else []


def _name_of(reason: Path) -> str:
    return reason.name.rsplit(".", 2)[0]
