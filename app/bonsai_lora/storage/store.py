"""Named sets in a folder, one file each, shared by every process that opens the folder.

A write is acknowledged when it is on the disk: temporary file, fsync, rename, fsync of the folder.
A reader compares the file's identity (one `stat`) and takes the opened set it has, or maps the
file anew: no process ever tells another that something changed.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import resource
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import (
    BonsaiLoraError,
    BusyError,
    NewerFormatError,
    SetNotFoundError,
    StoreFullError,
    StoreReadOnlyError,
)
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.formats.peft import set_tensors
from bonsai_lora.storage.setfile import (
    RECORD_FORMAT,
    NewSet,
    SetRecord,
    StoredSet,
    open_set_file,
    read_record,
    write_header,
    write_set_file,
)
from bonsai_lora.storage.upload import Arrived

Identity = tuple[int, int, int]

_SUFFIX = ".safetensors"
_LOCKS = 64
_LEFTOVER_SECONDS = 60
_UNREADABLE = (
    BonsaiLoraError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
)
"""What a file that is none of ours makes its reader raise."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class SetStore:
    """A folder of sets. All methods may be called from any thread.

    `root` is made if missing; `max_open` sets stay mapped, by default half of the descriptors that
    the process may have, at most 1024. Raises OSError where the folder cannot be made.
    """

    def __init__(self, root: Path, *, max_open: int | None = None) -> None:
        self.root = root
        self._unmovable: dict[str, str] = {}
        self.temporary = root / "tmp"
        """Folder for files that nobody keeps, in the file system of the sets."""
        self._sets = root / "sets"
        self._sets_prefix = f"{self._sets}{os.sep}"
        self._locks = root / "locks"
        self._bad = root / "bad"
        # Python before 3.13 keeps a descriptor for each mapped file.
        self._max_open = max_open or min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open: OrderedDict[str, tuple[Identity, StoredSet]] = OrderedDict()
        self._records: dict[str, tuple[Identity, SetRecord]] = {}
        self._newer: dict[str, tuple[Identity, int]] = {}
        for folder in (self._sets, self.temporary, self._locks):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def list_names(self) -> list[str]:
        """Return the names of all sets, sorted."""
        names = (entry.name.removesuffix(_SUFFIX) for entry in os.scandir(self._sets))
        return sorted(name for name in names if is_set_name(name))

    def records(self) -> list[SetRecord]:
        """Return the records of all sets by name.

        A set deleted meanwhile is left out, and so is one that a newer release wrote.
        """
        found = []
        names = self.list_names()
        for name in names:
            with contextlib.suppress(SetNotFoundError, NewerFormatError):
                found.append(self.read_record(name))
        # What another process deleted is let go here at the latest.
        for gone in (self._open.keys() | self._records.keys() | self._newer.keys()) - set(names):
            self.forget(gone)
        return found

    def read_record(self, name: str) -> SetRecord:
        """Return the record of a set; raises SetNotFoundError, NewerFormatError."""
        identity = self._identity(name)
        known = self._records.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        record = self._checked(name, identity, read_record)
        self._records[name] = (identity, record)
        return record

    def read(self, name: str) -> StoredSet:
        """Return the set as it is now; raises SetNotFoundError, NewerFormatError.

        Costs one `stat` where the set is open in this process, and mapping its file otherwise.
        """
        identity = self._identity(name)
        known = self._open.get(name)
        if known is not None and known[0] == identity:
            with contextlib.suppress(KeyError):  # another thread may forget it meanwhile
                self._open.move_to_end(name)
            return known[1]
        opened = self._checked(name, identity, open_set_file)
        self._remember(name, identity, opened)
        return opened

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the right to change `name`, against every thread and process of this store."""
        with self._locked(self._stripe(name)):
            yield

    @contextlib.contextmanager
    def lock_all(self) -> Iterator[None]:
        """Hold the right to change what all sets sum to; taken inside `lock`, never around it."""
        with self._locked("all"):
            yield

    @staticmethod
    def _stripe(name: str) -> str:
        return f"{hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % _LOCKS:02}"

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a lock file; without `wait`, raises BlockingIOError where another holds it."""
        with _storage_errors(), (self._locks / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def write(
        self,
        lora_set: BonsaiLoraSet,
        *,
        origin: str,
        now: str,
        previous: SetRecord | None,
        adapter_config: Mapping[str, Any] | None = None,
        arrived: tuple[Arrived, Mapping[str, str]] | None = None,
    ) -> StoredSet:
        """Make `lora_set` the next version of its name, durably, and return it opened.

        Call with `lock` held. `now` is RFC 3339; `previous` is the version it replaces. `arrived`
        is an upload in a file of `new_file` with exactly these tensors, and their names here by
        the upload's: then only the header is written. Raises StoreFullError or
        StoreReadOnlyError, and then nothing has changed.
        """
        record = SetRecord(
            name=lora_set.adapter_name,
            uid=previous.uid if previous else secrets.token_hex(8),
            version=previous.version + 1 if previous else 1,
            created_at=previous.created_at if previous else now,
            updated_at=now,
            unknown=previous.unknown if previous else {},
            origin=origin,
            base_model_name=lora_set.base_model_name,
            config=lora_set.registry.config,
            adapter_count=lora_set.registry.adapter_count(),
            total_trainable_params=lora_set.total_trainable_params(),
            data_bytes=sum(one.nbytes for one in set_tensors(lora_set).values()),
        )
        new = NewSet(record, lora_set, adapter_config)
        with _storage_errors():
            if arrived is not None and write_header(new, *arrived):
                self._commit(arrived[0].file, record.name)
            else:
                with self.new_file() as file:
                    write_set_file(file, new)
                    self._commit(file, record.name)
        return self.read(record.name)

    @contextlib.contextmanager
    def new_file(self) -> Iterator[BinaryIO]:
        """Give a new temporary file in the store's file system; it is gone afterwards.

        It is locked while in use, so that no starting process takes it for a leftover.
        """
        path = self.temporary / secrets.token_hex(16)
        with _storage_errors(), path.open("x+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                path.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Remove a set durably; raises SetNotFoundError. Call with `lock` held."""
        if not is_set_name(name):
            raise SetNotFoundError(name)
        with _storage_errors():
            try:
                self._path(name).unlink()
            except FileNotFoundError:
                raise SetNotFoundError(name) from None
            _sync_folder(self._sets)
        self.forget(name)

    def open_sets(self) -> list[StoredSet]:
        """Return the sets that this process has open."""
        return [opened for _, opened in list(self._open.values())]

    def _commit(self, file: BinaryIO, name: str) -> None:
        """Make a temporary file the file of `name`, durably."""
        # Opened first: no descriptor left must not fail a write that has happened.
        folder = os.open(self._sets, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._commit_into(folder, file, name)
        finally:
            os.close(folder)

    def _commit_into(self, folder: int, file: BinaryIO, name: str) -> None:
        file.flush()
        # The kernel's clock ticks every few milliseconds; identities want nanoseconds.
        now = time.time_ns()
        os.utime(file.fileno(), ns=(now, now))
        os.fsync(file.fileno())
        Path(file.name).rename(self._path(name))
        os.fsync(folder)

    def _path(self, name: str) -> Path:
        return self._sets / f"{name}{_SUFFIX}"

    def _identity(self, name: str) -> Identity:
        if not is_set_name(name):
            raise SetNotFoundError(name)
        try:
            # Not Path.stat: this is on the way of every request.
            status = os.stat(f"{self._sets_prefix}{name}{_SUFFIX}")  # noqa: PTH116
        except FileNotFoundError:
            self.forget(name)
            raise SetNotFoundError(name) from None
        except OSError as error:  # a loop of links, a failing disk
            self._unmovable[name] = str(error)
            raise SetNotFoundError(name) from None
        if not stat.S_ISREG(status.st_mode):
            self._unmovable[name] = "it is no regular file"
            raise SetNotFoundError(name)
        return status.st_ino, status.st_mtime_ns, status.st_size

    def forget(self, name: str) -> None:
        """Let go of what this process has of a set; it is read anew when it is next asked for."""
        self._open.pop(name, None)
        self._records.pop(name, None)
        self._newer.pop(name, None)

    def _remember(self, name: str, identity: Identity, opened: StoredSet) -> None:
        self._open[name] = (identity, opened)
        with contextlib.suppress(KeyError):
            self._open.move_to_end(name)
        while len(self._open) > self._max_open:
            with contextlib.suppress(KeyError):
                self._open.popitem(last=False)

    def _checked(self, name: str, identity: Identity, reader: Callable[[Path], T]) -> T:
        """Return what `reader` makes of the file of `name`.

        A bad file is set aside; one of a newer release is left in place, and remembered, since
        every sum over all sets comes past it.
        """
        newer = self._newer.get(name)
        if newer is not None and newer[0] == identity:
            raise NewerFormatError(name, newer[1], RECORD_FORMAT)
        try:
            found = reader(self._path(name))
            self._unmovable.pop(name, None)
            self._newer.pop(name, None)
            return found
        except FileNotFoundError:
            raise SetNotFoundError(name) from None
        except OSError as error:
            with _storage_errors():
                raise
            raise SetNotFoundError(name) from error
        except NewerFormatError as error:
            self._newer[name] = (identity, error.values["got"])
            raise
        except _UNREADABLE as error:
            self._set_aside(name, identity, getattr(error, "detail", repr(error)))
            raise SetNotFoundError(name) from None

    def _set_aside(self, name: str, identity: Identity, reason: str) -> None:
        """Move a bad file out of the way, with its reason beside it, unless somebody changes it.

        Never waits for the lock: whoever reads while writing holds it already.
        """
        with (
            contextlib.suppress(OSError, StoreReadOnlyError, SetNotFoundError),
            self._locked(self._stripe(name), wait=False),
        ):
            if self._identity(name) != identity:
                return
            _log.error("the file of set %r is bad and is set aside: %s", name, reason)
            self._bad.mkdir(exist_ok=True)
            target = self._bad / f"{name}.{secrets.token_hex(4)}"
            self._path(name).rename(target.with_name(f"{target.name}{_SUFFIX}"))
            target.with_name(f"{target.name}.reason").write_text(reason, encoding="utf-8")
            return
        self._unmovable[name] = reason

    def newer_files(self) -> dict[str, int]:
        """Return name -> size in bytes of the files that a newer release wrote, as last seen."""
        return {name: identity[2] for name, (identity, _) in sorted(self._newer.items())}

    def bad_files(self) -> dict[str, str]:
        """Return name -> reason of the files that were set aside and are still there."""
        self._unmovable = {
            name: reason
            for name, reason in self._unmovable.items()
            if os.path.lexists(self._path(name))
        }
        found = dict(self._unmovable)
        if self._bad.is_dir():
            for path in sorted(self._bad.glob("*.reason")):
                found[path.name.rsplit(".", 2)[0]] = path.read_text(encoding="utf-8")
        return found

    def _remove_leftovers(self) -> None:
        """Remove temporary files whose process is gone; a new, empty one may not be locked yet."""
        for path in self.temporary.iterdir():
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = path.stat()
                if status.st_size or time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Turn the operating system's refusals to write into errors for the caller."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFullError(
                "the store has no room left; nothing was changed. Delete sets or enlarge the disk"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreReadOnlyError(
                "the store cannot be written to; nothing was changed"
            ) from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise BusyError("too many files are open; try again in a second") from error
        raise
