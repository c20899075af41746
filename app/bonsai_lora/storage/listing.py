"""Keep the table of sets (`storage/index.py`) equal to the folder of their files.

The files are the truth. Every change by this program commits the table's row right after the
rename, with the folder's time of modification, which it sets to the nanosecond. So a folder whose
time differs from the table's was changed by somebody else, or by a process that died in between.
All files are compared then: when a process begins, at the next use of a small folder, and of any
folder within a minute. So is a file found that was changed in place, in a small folder also when a
process begins.

The table is a file in the folder `index-1` of the store: N.sqlite with the largest N. A new one has
the next number, so that a process which still has the old one open cannot touch it. Where no file
can be written, each process has its own table in memory.
"""

import fcntl
import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from bonsai_lora.errors import BonsaiLoraError, NewerFormatError, SetNotFoundError
from bonsai_lora.formats.identity import is_unsettled
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.storage.disk import storage_errors
from bonsai_lora.storage.dropped import Dropped
from bonsai_lora.storage.files import SUFFIX
from bonsai_lora.storage.index import DamagedIndexError, Row, SetIndex
from bonsai_lora.storage.setfile import SetRecord

_FOLDER = "index-1"
"""The number is that of the table's columns, so that releases with different ones do not meet."""
_COMPARE_SECONDS = 30
_BATCH = 256
_FEW = 2000
"""So few files are compared when a process begins, and whenever others change the folder."""
_LOCK = "lock"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Listing:
    """The table of the sets in the folder `sets` of `root`. Thread-safe.

    `read_record` reads the record of a set from its file, and raises SetNotFoundError or
    NewerFormatError; all methods raise what else it raises.
    """

    def __init__(self, root: Path, read_record: Callable[[str], SetRecord]) -> None:
        self._sets = root / "sets"
        self._folder = root / _FOLDER
        self._read_record = read_record
        self._lock = threading.RLock()
        self._index: SetIndex | None = None
        self._inode = self._pid = -1
        self._is_compared = False
        self._in_memory_until = 0.0

    def ask(self, query: Callable[[SetIndex], T]) -> T:
        """Return the result of `query`, after a look at the folder's time."""
        with self._lock, storage_errors():
            for _ in range(3):  # the present file, the file that replaces it, and in memory
                try:
                    index = self._opened()
                    self._refresh(index)
                    return query(index)
                except sqlite3.Error as error:
                    self._give_up(error)
            return query(self._opened())

    def change(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`, which renames or removes the file of `name`, and note the result.

        Whatever happens to the table, the work is done exactly once, and its errors are raised.
        """
        is_done = False
        with self._lock:
            try:
                index = self._opened()
                with index.transaction():
                    agrees = index.folder_time() == self._folder_time()
                    is_done = True
                    work()
                    is_noted = self._note(index, name)
                    if agrees and is_noted:
                        index.set_folder_time(self._touch_folder())
            except sqlite3.Error as error:
                self._give_up(error)
        if not is_done:
            work()

    def compare(self, *, only_if_due: bool = False) -> None:
        """Compare the table with all files; `only_if_due`: unless a process did so lately."""
        with self._lock:
            index = self.ask(lambda one: one)
            age = abs(time.time() - index.compared_at())
            if only_if_due and age < _COMPARE_SECONDS:
                return
            began, known = self._begin_comparison(index), index.stamps()
        found, dropped = self._look()  # takes long, and others may use the table meanwhile
        differing = _differing(known, found)
        with self._lock:
            if index is not self._index:
                return  # replaced meanwhile, and compared then
            try:
                self._settle(index, differing, dropped)
                index.end_comparison(began)
            except sqlite3.Error as error:
                self._give_up(error)

    def rebuild(self) -> None:
        """Make a new table from the files; running processes use the old one until it is whole."""
        new = self._folder / "new.sqlite"
        with self._lock, self._opening():
            self._close()
            _remove(new)  # what is left of a process that was killed
            index = SetIndex(new)
            try:
                self._compare(index)
            finally:
                index.close()
            self._replace(new)

    def _opened(self) -> SetIndex:
        """Return the present table; a newly opened one agrees with the folder's time."""
        if self._index is not None and self._is_current(self._index):
            return self._index
        self._close()
        is_shared = not self._must_be_in_memory()
        with self._opening() if is_shared else nullcontext():
            index = self._open_file() if is_shared else SetIndex(None)
            self._index, self._pid, self._is_compared = index, os.getpid(), False
            if not self._agrees(index) or index.sums("").sets <= _FEW:
                self._compare(index)
        self._is_compared = True
        return index

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Let one process make a new table while others that begin wait, and find it made."""
        with _as_sqlite_errors():
            self._folder.mkdir(exist_ok=True)
            file = (self._folder / _LOCK).open("w")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _agrees(self, index: SetIndex) -> bool:
        """Return whether nobody else has changed the folder since the table was compared."""
        return index.is_whole() and index.folder_time() == self._folder_time()

    def _open_file(self) -> SetIndex:
        with _as_sqlite_errors():
            while True:
                path = self._newest_path()
                index = SetIndex(path)
                self._inode = path.stat().st_ino
                if path == self._newest_path():
                    return index
                index.close()  # another process has replaced it meanwhile

    def _is_current(self, index: SetIndex) -> bool:
        """Return whether the table is of this process, and still the one that all share."""
        if self._pid != os.getpid() or not self._is_compared:
            return False
        if index.path is None:
            return self._must_be_in_memory()
        try:
            return os.stat(index.path).st_ino == self._inode  # noqa: PTH116 - on every use
        except OSError:
            return False

    def _must_be_in_memory(self) -> bool:
        if time.monotonic() < self._in_memory_until:
            return True
        return not (os.access(self._sets, os.W_OK) and os.access(self._sets.parent, os.W_OK))

    def _newest_path(self) -> Path:
        self._folder.mkdir(exist_ok=True)
        numbers = [int(one.stem) for one in self._folder.glob("*.sqlite") if one.stem.isdecimal()]
        return self._folder / f"{max(numbers, default=1)}.sqlite"

    def _replace(self, new: Path | None = None) -> None:
        """Make `new`, or an empty file, the newest one, and remove the present one."""
        path = self._newest_path()
        newest = path.with_name(f"{int(path.stem) + 1}.sqlite")
        if new is None:
            newest.touch()
        else:
            new.rename(newest)
        _remove(path)  # last, so that one always exists

    def _close(self) -> None:
        if self._index is not None and self._pid == os.getpid():
            self._index.close()
        self._index = None

    def _give_up(self, error: sqlite3.Error) -> None:
        """Replace a damaged table; after other errors, use one in memory for a while."""
        self._close()
        is_damaged = isinstance(error, DamagedIndexError) or (
            getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
        )
        if is_damaged:
            _log.error("the index of the store is damaged and is made again: %s", error)
            with _as_sqlite_errors():
                self._replace()
            return
        _log.warning("the index of the store cannot be used, and is kept in memory: %s", error)
        self._in_memory_until = time.monotonic() + _COMPARE_SECONDS

    def _refresh(self, index: SetIndex) -> None:
        """Compare the table with the files if somebody else has changed the folder.

        No request waits for that in a large folder: `compare` does it within a minute.
        """
        if index.folder_time() == self._folder_time() or index.sums("").sets > _FEW:
            return
        with index.transaction():  # a writer may be between its rename and its commit
            if index.folder_time() == self._folder_time():
                return
        self._compare(index)

    def _compare(self, index: SetIndex) -> None:
        began, known = self._begin_comparison(index), index.stamps()
        found, dropped = self._look()
        self._settle(index, _differing(known, found), dropped)
        index.end_comparison(began)

    def _begin_comparison(self, index: SetIndex) -> float:
        """Note that a comparison begins, and return its Unix time for `end_comparison`.

        From now on, changes by others change the folder's time again. A process that begins before
        the end does not trust the table, unless it agreed before.
        """
        now = time.time()
        with index.transaction():
            is_needed = not self._agrees(index)
            index.set_folder_time(self._touch_folder())
            index.begin_comparison(now, is_needed=is_needed)
        return now

    def _settle(self, index: SetIndex, differing: list[str], dropped: Dropped) -> None:
        """Make the rows of the sets `differing` those of their files.

        These are read before each transaction, for which writers wait.
        """
        if dropped != index.dropped():
            with index.transaction():
                index.set_dropped(dropped)
        for begin in range(0, len(differing), _BATCH):
            rows = {name: self._read_row(name) for name in differing[begin : begin + _BATCH]}
            with index.transaction():
                for name, row in rows.items():
                    if row is not None and row.stamp == _stamp_of(self._path(name)):
                        index.put(row)
                    else:  # gone, or changed meanwhile
                        self._compare_file(index, name)

    def _note(self, index: SetIndex, name: str) -> bool:
        """Make the row of a set that of its new file; return False if it could not be read.

        Then the folder's time is left as it is, so that the files are compared later: running out
        of descriptors must not fail a completed write.
        """
        try:
            self._compare_file(index, name)
        except BonsaiLoraError:
            return False
        return True

    def _look(self) -> tuple[dict[str, str | None], Dropped]:
        """Return the stamps of all files by the set's name, and what is not a file of a set."""
        found, dropped = {}, Dropped()
        for entry in os.scandir(self._sets):
            name = entry.name.removesuffix(SUFFIX)
            if is_set_name(name) and name != entry.name and not _leads_nowhere(entry):
                found[name] = _stamp_of(entry)
            else:
                dropped.add(f"{self._sets.name}/", entry)
        dropped.names.sort()
        return found, dropped

    def _compare_file(self, index: SetIndex, name: str) -> None:
        """Make the row of one set that of its file. Call in a transaction."""
        row = self._read_row(name)
        if row is None:
            index.remove(name)
        else:
            index.put(row)

    def _read_row(self, name: str) -> Row | None:
        """Return the row of a set's file; None if there is no set."""
        path = self._path(name)
        stamp = _stamp_of(path)
        try:
            record: SetRecord | None = self._read_record(name)
        except NewerFormatError:
            record = None
        except SetNotFoundError:
            return None
        try:
            return Row(name, stamp or "", record, path.stat().st_size)
        except FileNotFoundError:  # removed since
            return None

    def _path(self, name: str) -> Path:
        return self._sets / f"{name}{SUFFIX}"

    def _folder_time(self) -> int:
        return os.stat(self._sets).st_mtime_ns  # noqa: PTH116 - on every use

    def _touch_folder(self) -> int:
        """Give the folder a time of modification that no other change has, and return it."""
        now = time.time_ns()
        try:
            os.utime(self._sets, ns=(now, now))
        except OSError:  # only its owner may; the kernel's times are milliseconds apart
            return self._folder_time()
        return self._folder_time()


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry is a symbolic link to nothing, which looks like no file at all."""
    try:
        if entry.is_symlink():
            entry.stat()
    except FileNotFoundError:
        return True
    except OSError:  # a loop, which is set aside
        pass
    return False


def _remove(path: Path) -> None:
    """Remove a file of SQLite, if there is one, and those that belong to it."""
    for ending in ("", "-wal", "-shm"):
        path.with_name(f"{path.name}{ending}").unlink(missing_ok=True)


def _differing(known: dict[str, str], found: dict[str, str | None]) -> list[str]:
    """Return the names whose files are gone, or may not be those of their rows."""
    changed = [name for name, stamp in found.items() if stamp is None or known.get(name) != stamp]
    return sorted(changed + [name for name in known if name not in found])


def _stamp_of(entry: "os.DirEntry[str] | Path") -> str | None:
    """Return what changes with a file; None if it cannot tell, or the entry is not a file.

    The time of the last change of the inode is not part of it: a hard link, as a backup makes,
    changes that of every file.
    """
    try:
        status = entry.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode) or is_unsettled(status):
        return None
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


@contextmanager
def _as_sqlite_errors() -> Iterator[None]:
    """Turn OSErrors into those of SQLite, which the caller handles."""
    try:
        yield
    except OSError as error:
        raise sqlite3.OperationalError(str(error)) from error
