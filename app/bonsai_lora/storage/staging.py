"""Uploads that wait in the store for the commit that names them, where all its processes find them.

    {root}/staged/{sha256}.{set}   a whole file, renamed into place once it is complete
    {root}/staged/secret           what signs the links that such files are uploaded to

A file is staged for one set, so that nobody can use, or ask for, what others have uploaded.
"""

import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from bonsai_lora.formats.names import is_set_name, is_sha256
from bonsai_lora.storage.disk import storage_errors, synced
from bonsai_lora.storage.files import SetFiles

FOLDER = "staged"
SECRET = "secret"  # noqa: S105 - the name of its file
STAGED_SECONDS = 86400
"""How long a file waits for its commit."""
SECRET_BYTES = 32
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Staged:
    """A file: for which set, its SHA-256 in hexadecimal, and its length in bytes."""

    name: str
    sha256: str
    size: int

    @property
    def key(self) -> str:
        """The name of the file or object."""
        return f"{self.sha256}.{self.name}"


Check = Callable[[Sequence[Staged]], None]
"""Called with all that is staged; raises an error if one more may not be."""


class Staging(Protocol):
    """The staged files of a store. Thread-safe; the methods raise StoreUnreachableError."""

    def secret(self) -> bytes:
        """Return the secret of the store, which is made when it is first needed."""

    def listed(self) -> list[Staged]:
        """Return all files."""

    def add(self, file: BinaryIO, staged: Staged, check: Check) -> None:
        """Make a complete file of `new_file` a staged one, durably, if `check` allows it."""

    def pieces(self, staged: Staged) -> Iterator[bytes]:
        """Yield a file, nothing unless it has the right length; raises FileNotFoundError."""

    def remove(self, staged: Staged) -> None:
        """Remove a file, if it is there."""

    def expire(self) -> int:
        """Remove what has waited too long, and return how many files that were."""


def staged_of(key: str, size: int) -> Staged | None:
    """Return the staged file with this name; None for the secret, and what is not the store's."""
    sha256, _, name = key.partition(".")
    return Staged(name, sha256, size) if is_sha256(sha256) and is_set_name(name) else None


def checked_secret(found: bytes, place: str) -> bytes:
    """Return a secret; raises ValueError unless it has the right length."""
    if len(found) != SECRET_BYTES:
        raise ValueError(f"{place} has {len(found)} bytes, not {SECRET_BYTES}; delete it")
    return found


class StagingFolder:
    """A folder in that of a store's files; a `Staging`."""

    def __init__(self, files: SetFiles) -> None:
        self._files = files
        self._folder = files.root / FOLDER

    def secret(self) -> bytes:
        """Return the secret of the store, which is made when it is first needed."""
        path = self._folder / SECRET
        with storage_errors():
            if not path.exists():
                self._make_secret(path)
            return checked_secret(path.read_bytes(), str(path))

    def _make_secret(self, path: Path) -> None:
        """Write a new secret, unless a different process is faster; it is never there in part."""
        self._make_folder()
        with synced(self._folder), self._files.new_file() as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(str(file.name), path)

    def _make_folder(self) -> None:
        if not self._folder.is_dir():
            with synced(self._folder.parent):
                self._folder.mkdir(mode=0o700, exist_ok=True)

    def listed(self) -> list[Staged]:
        """Return all files."""
        return [one for one, _ in _entries(self._folder)]

    def add(self, file: BinaryIO, staged: Staged, check: Check) -> None:
        """Rename a complete file of `new_file` to a staged one, durably, if `check` allows it."""
        with storage_errors():
            self._make_folder()
            file.flush()
            os.fsync(file.fileno())
            with synced(self._folder), self._files.locked(FOLDER):
                check(self.listed())
                os.rename(str(file.name), self._folder / staged.key)  # noqa: PTH104

    def pieces(self, staged: Staged) -> Iterator[bytes]:
        """Yield a file, nothing unless it has the right length; raises FileNotFoundError."""
        with (self._folder / staged.key).open("rb") as file:
            if os.fstat(file.fileno()).st_size == staged.size:
                yield from iter(partial(file.read, _PIECE_BYTES), b"")

    def remove(self, staged: Staged) -> None:
        """Remove a file; one that stays, for whatever reason, is removed after a day."""
        with suppress(OSError):
            (self._folder / staged.key).unlink()

    def expire(self) -> int:
        """Remove what has waited too long, and return how many files that were."""
        return expire_folder(self._folder)


def expire_folder(folder: Path) -> int:
    """Remove the files of a folder that have waited too long, and return how many.

    One that cannot be removed, as in a store that is read-only, is tried again the next time.
    """
    before, removed = time.time() - STAGED_SECONDS, 0
    for one, written in _entries(folder):
        if written < before:
            with suppress(OSError):
                (folder / one.key).unlink()
                removed += 1
    return removed


def _entries(folder: Path) -> list[tuple[Staged, float]]:
    """Return the files of a folder, and the Unix times at which they were written."""
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                one = staged_of(entry.name, status.st_size)
                if one is not None and stat.S_ISREG(status.st_mode):
                    found.append((one, status.st_mtime))
    return found
