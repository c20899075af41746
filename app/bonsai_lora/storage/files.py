"""Files of sets in a folder, opened by any number of processes.

A reader checks the identity of the file with one `stat`, and memory-maps it again if it has
changed; processes do not notify each other.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import resource
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from bonsai_lora.errors import (
    BonsaiLoraError,
    NewerFormatError,
    SetNotFoundError,
    StoreFullError,
    StoreReadOnlyError,
)
from bonsai_lora.formats.identity import Identity, identity_of
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.storage.bad_files import BadFiles
from bonsai_lora.storage.disk import storage_errors, synced
from bonsai_lora.storage.in_use import OpenNames, suspects
from bonsai_lora.storage.leftovers import remove_leftovers
from bonsai_lora.storage.setfile import (
    RECORD_FORMAT,
    SetRecord,
    StoredSet,
    open_set_file,
    read_record,
)
from bonsai_lora.storage.verify import OnPiece, verify_set_file

SUFFIX = ".safetensors"
_LOCKS = 64
_INODE, _WRITTEN, _SIZE = 0, 1, 3
"""Places of inode, time of modification and length in a file's identity."""
_QUICK_BYTES = 1 << 20
"""A file up to this length is opened in milliseconds, whatever is in it."""
_QUICK_HEADER_BYTES = 1 << 16
"""A longer one is, with a header up to this length."""
_MOST_RECORDS = 1 << 12
_UNREADABLE = (BonsaiLoraError, LookupError, ValueError, TypeError, AttributeError, RecursionError)
"""Exceptions that reading a foreign or damaged file may raise."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class SetFiles:
    """A folder of set files. Thread-safe.

    `root` is created if missing. Up to `max_open` sets stay memory-mapped, by default half of the
    process's file descriptor limit, at most 1024. `shared` is a folder of all workers of a service,
    where each finds what others had open when they died. Raises OSError if `root` cannot be made.
    """

    def __init__(
        self, root: Path, *, max_open: int | None = None, shared: Path | None = None
    ) -> None:
        self.root = root
        self.temporary = root / "tmp"
        """Folder for temporary files, on the same file system as the sets."""
        self._sets = root / "sets"
        self._sets_prefix = f"{self._sets}{os.sep}"
        self._locks = root / "locks"
        self.bad = BadFiles(root / "bad")
        """Files that cannot be read."""
        # Before Python 3.13, each mapping keeps a file descriptor open.
        self._max_open = max_open or min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open: OrderedDict[str, tuple[Identity, StoredSet]] = OrderedDict()
        self._records: dict[str, tuple[Identity, SetRecord]] = {}
        self._newer: dict[str, tuple[Identity, int]] = {}
        self._suspects = set() if shared is None else suspects(shared)
        self._names = None if shared is None else OpenNames(shared)
        self.on_open: Callable[[SetRecord], None] | None = None
        """Called with the record of each version that `read` opens."""
        for folder in (self._sets, self.temporary, self._locks):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.temporary)

    def is_writable(self) -> bool:
        """Return whether this process may change sets."""
        return all(os.access(one, os.W_OK) for one in (self._sets, self.temporary, self._locks))

    def read_record(self, name: str) -> SetRecord:
        """Return the record of a set; raises SetNotFoundError, NewerFormatError."""
        identity = self._identity(name)
        known = self._records.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        record = self._checked(name, identity, read_record)
        if len(self._records) >= _MOST_RECORDS:
            self._records.clear()
        self._records[name] = (identity, record)
        return record

    def read(self, name: str) -> StoredSet:
        """Return the current version of a set; raises SetNotFoundError, NewerFormatError.

        Costs one `stat` if this process has the version open, else it is memory-mapped. A file that
        was written in place since this process opened it is read in full and verified first.
        """
        return self._read(name, self._identity(name))

    def _read(self, name: str, identity: Identity) -> StoredSet:
        known = self._open.get(name)
        if known is not None and known[0] == identity:
            try:  # noqa: SIM105 - every request comes here, and `suppress` is four calls
                self._open.move_to_end(name)
            except KeyError:  # another thread has evicted it meanwhile
                pass
            return known[1]
        self._note_change(name, identity)
        if name in self._suspects:
            self._checked(name, identity, verify_set_file)
            self._suspects.discard(name)
        opened = self._open_version(name, identity)
        if self.on_open is not None:
            self.on_open(opened.record)
        return opened

    def read_quickly(self, name: str) -> StoredSet | None:
        """Return `read(name)`, or None if it is not open and opening it may take long.

        It does if the file has a long header, or if all of it has to be checked first.
        """
        identity = self._identity(name)
        known = self._open.get(name)
        if known is None or known[0] != identity:
            self._note_change(name, identity)
            if identity[_SIZE] > _QUICK_BYTES and not self._opens_quickly(name):
                return None
        return self._read(name, identity)

    def _note_change(self, name: str, identity: Identity) -> None:
        """Suspect an open set whose file was written in place; this program replaces files.

        Its times of change alone are no reason: a hard link, as a backup makes, changes one.
        """
        known = self._open.get(name)
        if known is None or known[0][_INODE] != identity[_INODE]:
            return
        if any(known[0][place] != identity[place] for place in (_WRITTEN, _SIZE)):
            self._suspects.add(name)

    def _opens_quickly(self, name: str) -> bool:
        if name in self._suspects or self.read_record(name).digest is None:
            return False
        with storage_errors(), self._path(name).open("rb") as file:
            return int.from_bytes(file.read(8), "little") <= _QUICK_HEADER_BYTES

    def verify(self, name: str, on_piece: OnPiece | None = None) -> SetRecord:
        """Read the file of a set, and move it aside if its tensors are not what was written.

        Raises SetNotFoundError, with the reason in `bad`, and NewerFormatError.
        """
        reader = partial(verify_set_file, on_piece=on_piece)
        return self._checked(name, self._identity(name), reader, wait=True)

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock to change `name`, across threads and processes."""
        return self.locked(self._stripe(name))

    @staticmethod
    def _stripe(name: str) -> str:
        return f"{hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % _LOCKS:02}"

    @contextlib.contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a lock file; with `wait=False`, raises BlockingIOError if it is held."""
        with storage_errors(), (self._locks / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    @contextlib.contextmanager
    def new_file(self) -> Iterator[BinaryIO]:
        """Create a temporary file on the store's file system; it is removed on exit.

        It is locked while in use, so that a starting process does not remove it as a leftover.
        """
        path = self.temporary / secrets.token_hex(16)
        with storage_errors(), path.open("x+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                path.unlink(missing_ok=True)

    def commit(self, file: BinaryIO, name: str) -> None:
        """Rename a file of `new_file` to the file of `name`, durably. Call with `lock` held."""
        # Open the folder first: running out of descriptors must not fail a completed write.
        with synced(self._sets):
            file.flush()
            # The kernel's timestamps are milliseconds apart; identities need nanoseconds.
            now = time.time_ns()
            os.utime(file.fileno(), ns=(now, now))
            os.fsync(file.fileno())
            self._change(name, partial(os.rename, file.name, self._path(name)))

    def remove(self, name: str) -> None:
        """Delete the file of a set durably; raises SetNotFoundError. Call with `lock` held."""
        if not is_set_name(name):
            raise SetNotFoundError(name)
        with storage_errors(), synced(self._sets):
            try:
                self._change(name, self._path(name).unlink)
            except FileNotFoundError:
                raise SetNotFoundError(name) from None
        self.forget(name)

    def _change(self, name: str, work: Callable[[], None]) -> None:  # noqa: ARG002
        """Do `work`, which renames or removes the file of `name`."""
        work()

    def open_sets(self) -> list[StoredSet]:
        """Return the sets that this process has open; releases those that others have deleted."""
        for name in list(self._open):
            with contextlib.suppress(SetNotFoundError):
                self._identity(name)
        return [opened for _, opened in list(self._open.values())]

    def forget(self, name: str) -> None:
        """Release this process's state of a set; it is read again on next use."""
        self._open.pop(name, None)
        self._records.pop(name, None)
        self._newer.pop(name, None)

    def bad_files(self, most: int | None = None) -> dict[str, str]:
        """Return the reasons, by set name, of up to `most` files that cannot be read."""
        return self.bad.reasons(most)

    def count_bad_files(self) -> int:
        """Return the number of names of files that cannot be read."""
        return self.bad.count()

    def _path(self, name: str) -> Path:
        return self._sets / f"{name}{SUFFIX}"

    def _identity(self, name: str) -> Identity:
        if not is_set_name(name):
            raise SetNotFoundError(name)
        try:
            status = os.stat(f"{self._sets_prefix}{name}{SUFFIX}")  # noqa: PTH116 - hot path
        except FileNotFoundError:
            self.forget(name)
            raise SetNotFoundError(name) from None
        except OSError as error:  # a loop of links, a failing disk
            self.bad.note(name, self._path(name), str(error))
            raise SetNotFoundError(name) from None
        if not stat.S_ISREG(status.st_mode):
            self.bad.note(name, self._path(name), "it is not a regular file")
            raise SetNotFoundError(name)
        return identity_of(status)

    def _open_version(self, name: str, identity: Identity) -> StoredSet:
        if self._names is not None:
            self._names.add(name, list(self._open))
        opened = self._checked(name, identity, open_set_file)
        self._open[name] = (identity, opened)
        with contextlib.suppress(KeyError):
            self._open.move_to_end(name)
        while len(self._open) > self._max_open:
            with contextlib.suppress(KeyError):
                self._open.popitem(last=False)
        return opened

    def _checked(
        self, name: str, identity: Identity, reader: Callable[[Path], T], *, wait: bool = False
    ) -> T:
        """Read the file of `name` with `reader`.

        Moves an unreadable file aside; `wait` is that of `_set_aside`. A file that a newer release
        wrote is kept, and remembered so that totals over all sets need not read it again.
        """
        newer = self._newer.get(name)
        if newer is not None and newer[0] == identity:
            raise NewerFormatError(name, newer[1], RECORD_FORMAT)
        try:
            found = reader(self._path(name))
            self.bad.forget(name)
            self._newer.pop(name, None)
            return found
        except FileNotFoundError:
            raise SetNotFoundError(name) from None
        except OSError as error:
            with contextlib.suppress(OSError), storage_errors():
                raise
            self.bad.note(name, self._path(name), str(error))  # a failing disk
            raise SetNotFoundError(name) from error
        except NewerFormatError as error:
            self._newer[name] = (identity, error.values["got"])
            raise
        except _UNREADABLE as error:
            self._set_aside(name, identity, getattr(error, "detail", repr(error)), wait=wait)
            raise SetNotFoundError(name) from None

    def _set_aside(self, name: str, identity: Identity, reason: str, *, wait: bool) -> None:
        """Move an unreadable file to the folder `bad`, with its reason, unless it was changed.

        Raises SetNotFoundError if it is gone. Without `wait`, only if the lock is free: the calling
        thread may hold it.
        """
        with (
            contextlib.suppress(OSError, StoreFullError, StoreReadOnlyError),
            self.locked(self._stripe(name), wait=wait),
        ):
            if self._identity(name) != identity:
                return
            _log.error("the file of set %r is unreadable and is moved aside: %s", name, reason)
            self.bad.move(name, self._path(name), reason)
            return
        self.bad.note(name, self._path(name), reason)
