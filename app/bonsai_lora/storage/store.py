"""A store of named sets: a folder with one file per set, shared by any number of processes.

A write is durable when it returns: temporary file, fsync, atomic rename, fsync of the folder. A
reader checks the identity of the file with one `stat`, and memory-maps it again if it has changed;
processes do not notify each other.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import (
    BonsaiLoraError,
    NewerFormatError,
    SetNotFoundError,
    StoreFullError,
    StoreReadOnlyError,
)
from bonsai_lora.formats.identity import Identity, identity_of
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.formats.peft import set_tensors
from bonsai_lora.storage.bad_files import BadFiles
from bonsai_lora.storage.disk import storage_errors, synced
from bonsai_lora.storage.in_use import OpenNames, suspects
from bonsai_lora.storage.index import SetIndex
from bonsai_lora.storage.leftovers import remove_leftovers
from bonsai_lora.storage.listing import SUFFIX, Listing
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
from bonsai_lora.storage.source import Source
from bonsai_lora.storage.upload import ReceivedUpload
from bonsai_lora.storage.verify import OnPiece, verify_set_file

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


class SetStore:
    """A folder of sets. Thread-safe.

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
        self.listing = Listing(root, self.read_record)
        """The table of all sets, for pages and sums."""
        for folder in (self._sets, self.temporary, self._locks):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.temporary)

    def is_writable(self) -> bool:
        """Return whether this process may change sets."""
        return all(os.access(one, os.W_OK) for one in (self._sets, self.temporary, self._locks))

    def list_names(self) -> list[str]:
        """Return the names of all sets, sorted."""
        names = (entry.name.removesuffix(SUFFIX) for entry in os.scandir(self._sets))
        return sorted(name for name in names if is_set_name(name))

    def records(self) -> list[SetRecord]:
        """Return the records of all sets, sorted by name.

        Leaves out sets that a newer release wrote.
        """
        return self.listing.ask(lambda index: index.page([""], after="", base=None, limit=-1))

    def held_bytes(self, besides: str) -> int:
        """Return the size in bytes of all sets but one, as float32.

        Sets that a newer release wrote count as much as their files.
        """

        def held(index: SetIndex) -> int:
            total, one = index.sums(""), index.sums_of(besides)
            return total.held_bytes + total.newer_bytes - one.held_bytes - one.newer_bytes

        return self.listing.ask(held)

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
            with contextlib.suppress(KeyError):  # another thread may evict it meanwhile
                self._open.move_to_end(name)
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
        return self._locked(self._stripe(name))

    def lock_all(self) -> AbstractContextManager[None]:
        """Hold the lock to change the total of all sets; acquire it inside `lock`, if both."""
        return self._locked("all")

    @staticmethod
    def _stripe(name: str) -> str:
        return f"{hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % _LOCKS:02}"

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a lock file; with `wait=False`, raises BlockingIOError if it is held."""
        with storage_errors(), (self._locks / name).open("w") as file:
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
        received: tuple[ReceivedUpload, Mapping[str, str]] | None = None,
        source: Source | None = None,
    ) -> StoredSet:
        """Write `lora_set` durably as the next version of its name, and return it opened.

        Call with `lock` held. `now` is RFC 3339; `previous` is the version to replace. `received`
        is an upload of exactly these tensors into a file of `new_file`, and the mapping from its
        tensor names to the set's: only the header is written then. Raises StoreFullError or
        StoreReadOnlyError, and then changes nothing.
        """
        record = SetRecord(
            name=lora_set.adapter_name,
            uid=previous.uid if previous else secrets.token_hex(8),
            version=previous.version + 1 if previous else 1,
            created_at=previous.created_at if previous else now,
            updated_at=now,
            unknown=previous.unknown if previous else {},
            source=source,
            origin=origin,
            base_model_name=lora_set.base_model_name,
            config=lora_set.registry.config,
            adapter_count=lora_set.registry.adapter_count(),
            total_trainable_params=lora_set.total_trainable_params(),
            data_bytes=sum(one.nbytes for one in set_tensors(lora_set).values()),
        )
        new = NewSet(record, lora_set, adapter_config)
        with storage_errors():
            if received is not None and write_header(new, *received):
                self.commit(received[0].file, record.name)
            else:
                with self.new_file() as file:
                    write_set_file(file, new)
                    self.commit(file, record.name)
        return self._open_version(record.name, self._identity(record.name))

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

    def delete(self, name: str) -> None:
        """Delete a set durably; raises SetNotFoundError. Call with `lock` held."""
        if not is_set_name(name):
            raise SetNotFoundError(name)
        with storage_errors(), self.lock_all(), synced(self._sets):
            try:
                self.listing.change(name, self._path(name).unlink)
            except FileNotFoundError:
                raise SetNotFoundError(name) from None
        self.forget(name)

    def open_sets(self) -> list[StoredSet]:
        """Return the sets that this process has open; releases those that others have deleted."""
        for name in list(self._open):
            with contextlib.suppress(SetNotFoundError):
                self._identity(name)
        return [opened for _, opened in list(self._open.values())]

    def commit(self, file: BinaryIO, name: str) -> None:
        """Rename a file of `new_file` to the file of `name`, durably. Call with `lock` held."""
        # Open the folder first: running out of descriptors must not fail a completed write.
        with synced(self._sets):
            file.flush()
            # The kernel's timestamps are milliseconds apart; identities need nanoseconds.
            now = time.time_ns()
            os.utime(file.fileno(), ns=(now, now))
            os.fsync(file.fileno())
            self.listing.change(name, partial(os.rename, file.name, self._path(name)))

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

    def forget(self, name: str) -> None:
        """Release this process's state of a set; it is read again on next use."""
        self._open.pop(name, None)
        self._records.pop(name, None)
        self._newer.pop(name, None)

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
            with storage_errors():
                raise
            raise SetNotFoundError(name) from error
        except NewerFormatError as error:
            self._newer[name] = (identity, error.values["got"])
            raise
        except _UNREADABLE as error:
            self._set_aside(name, identity, getattr(error, "detail", repr(error)), wait=wait)
            raise SetNotFoundError(name) from None

    def _set_aside(self, name: str, identity: Identity, reason: str, *, wait: bool) -> None:
        """Move an unreadable file to the folder `bad`, with its reason, unless it was changed.

        Without `wait`, only if the lock is free: the calling thread may hold it.
        """
        with (
            contextlib.suppress(OSError, StoreFullError, StoreReadOnlyError, SetNotFoundError),
            self._locked(self._stripe(name), wait=wait),
        ):
            if self._identity(name) != identity:
                return
            _log.error("the file of set %r is unreadable and is moved aside: %s", name, reason)
            self.bad.move(name, self._path(name), reason)
            return
        self.bad.note(name, self._path(name), reason)

    def newer_files(self) -> dict[str, int]:
        """Return the sizes in bytes, by set name, of files that a newer release wrote."""
        return self.listing.ask(SetIndex.newer_files)
