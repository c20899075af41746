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
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from app.core.loraset import BonsaiLoraSet
from app.errors import (
    HeaderTooLargeError,
    MalformedSafetensorsError,
    SetNotFoundError,
    StoreFullError,
    StoreReadOnlyError,
)
from app.formats.names import is_set_name
from app.storage.setfile import (
    SetRecord,
    StoredSet,
    data_bytes,
    open_set_file,
    read_record,
    write_set_file,
)

Identity = tuple[int, int, int]

_SUFFIX = ".safetensors"
_LOCKS = 64

T = TypeVar("T")
_log = logging.getLogger(__name__)


class SetStore:
    """A folder of sets. All methods may be called from any thread.

    `root` is made if missing. Raises OSError where that fails.
    """

    def __init__(self, root: Path, *, max_open: int = 1024) -> None:
        self.root = root
        self.bad_files: dict[str, str] = {}
        """Name -> reason, of files that were set aside since the start."""
        self._temporary = root / "tmp"
        self._sets = root / "sets"
        self._sets_prefix = f"{self._sets}{os.sep}"
        self._locks = root / "locks"
        self._bad = root / "bad"
        self._max_open = max_open
        self._open: OrderedDict[str, tuple[Identity, StoredSet]] = OrderedDict()
        self._records: dict[str, tuple[Identity, SetRecord]] = {}
        for folder in (self._sets, self._temporary, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def list_names(self) -> list[str]:
        """Return the names of all sets, sorted."""
        names = (entry.name.removesuffix(_SUFFIX) for entry in os.scandir(self._sets))
        return sorted(name for name in names if is_set_name(name))

    def records(self) -> list[SetRecord]:
        """Return the records of all sets by name; a set deleted meanwhile is left out."""
        found = []
        for name in self.list_names():
            with contextlib.suppress(SetNotFoundError):
                found.append(self.read_record(name))
        return found

    def read_record(self, name: str) -> SetRecord:
        """Return the record of a set; raises SetNotFoundError."""
        identity = self._identity(name)
        known = self._records.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        record = self._checked(name, read_record)
        self._records[name] = (identity, record)
        return record

    def read(self, name: str) -> StoredSet:
        """Return the set as it is now; raises SetNotFoundError.

        Costs one `stat` where the set is open in this process, and mapping its file otherwise.
        """
        identity = self._identity(name)
        known = self._open.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        opened = self._checked(name, open_set_file)
        self._remember(name, identity, opened)
        return opened

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the right to change `name`, against every thread and process of this store."""
        stripe = hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % _LOCKS
        with _storage_errors(), (self._locks / f"{stripe:02}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def write(
        self,
        lora_set: BonsaiLoraSet,
        *,
        origin: str,
        now: str,
        previous: SetRecord | None,
        adapter_config: Mapping[str, Any] | None = None,
    ) -> StoredSet:
        """Make `lora_set` the next version of its name, durably, and return it opened.

        Call with `lock` held. `now` is RFC 3339; `previous` is the version it replaces. Raises
        StoreFullError or StoreReadOnlyError, and then nothing has changed.
        """
        adapters = lora_set.registry.adapters
        record = SetRecord(
            name=lora_set.adapter_name,
            uid=previous.uid if previous else secrets.token_hex(8),
            version=previous.version + 1 if previous else 1,
            created_at=previous.created_at if previous else now,
            updated_at=now,
            origin=origin,
            base_model_name=lora_set.base_model_name,
            config=lora_set.registry.config,
            adapter_count=lora_set.registry.adapter_count(),
            total_trainable_params=lora_set.total_trainable_params(),
            data_bytes=data_bytes(adapters),
        )
        with _storage_errors(), self.new_file() as file:
            write_set_file(file, record, adapters, adapter_config)
            self._commit(file, record.name)
        return self.read(record.name)

    @contextlib.contextmanager
    def new_file(self) -> Iterator[BinaryIO]:
        """Give a new temporary file in the store's file system; it is gone afterwards.

        It is locked while in use, so that no starting process takes it for a leftover.
        """
        path = self._temporary / secrets.token_hex(16)
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
        self._forget(name)

    def open_sets(self) -> list[StoredSet]:
        """Return the sets that this process has open."""
        return [opened for _, opened in list(self._open.values())]

    def _commit(self, file: BinaryIO, name: str) -> None:
        """Make a temporary file the file of `name`, durably."""
        file.flush()
        # The kernel's clock ticks every few milliseconds; identities want nanoseconds.
        now = time.time_ns()
        os.utime(file.fileno(), ns=(now, now))
        os.fsync(file.fileno())
        Path(file.name).rename(self._path(name))
        _sync_folder(self._sets)

    def _path(self, name: str) -> Path:
        return self._sets / f"{name}{_SUFFIX}"

    def _identity(self, name: str) -> Identity:
        if not is_set_name(name):
            raise SetNotFoundError(name)
        try:
            # Not Path.stat: this is on the way of every request.
            status = os.stat(f"{self._sets_prefix}{name}{_SUFFIX}")  # noqa: PTH116
        except FileNotFoundError:
            self._forget(name)
            raise SetNotFoundError(name) from None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _forget(self, name: str) -> None:
        self._open.pop(name, None)
        self._records.pop(name, None)

    def _remember(self, name: str, identity: Identity, opened: StoredSet) -> None:
        self._open[name] = (identity, opened)
        self._open.move_to_end(name)
        while len(self._open) > self._max_open:
            with contextlib.suppress(KeyError):
                self._open.popitem(last=False)

    def _checked(self, name: str, reader: Callable[[Path], T]) -> T:
        """Return what `reader` makes of the file of `name`; a bad file is set aside."""
        try:
            return reader(self._path(name))
        except FileNotFoundError:
            raise SetNotFoundError(name) from None
        except (MalformedSafetensorsError, HeaderTooLargeError) as error:
            self._set_aside(name, error.detail)
            raise SetNotFoundError(name) from None

    def _set_aside(self, name: str, reason: str) -> None:
        _log.error("the file of set %r is bad and was set aside: %s", name, reason)
        self.bad_files[name] = reason
        with contextlib.suppress(OSError):
            self._bad.mkdir(exist_ok=True)
            self._path(name).rename(self._bad / f"{name}.{secrets.token_hex(4)}{_SUFFIX}")

    def _remove_leftovers(self) -> None:
        """Remove temporary files whose process is gone."""
        for path in self._temporary.iterdir():
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        raise
