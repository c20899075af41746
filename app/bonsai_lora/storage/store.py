"""A store of named sets: a folder with one file per set, shared by any number of processes.

A write is durable when it returns: temporary file, fsync, atomic rename, fsync of the folder.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from bonsai_lora.formats.names import is_set_name
from bonsai_lora.storage.disk import storage_errors
from bonsai_lora.storage.dropped import Dropped, dropped_beside_sets
from bonsai_lora.storage.files import SUFFIX, SetFiles
from bonsai_lora.storage.index import SetIndex, Sums
from bonsai_lora.storage.jobs import JobFolder, JobRecords
from bonsai_lora.storage.listing import Listing
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.protocol import Page, Store, allowed
from bonsai_lora.storage.setfile import SetRecord, StoredSet
from bonsai_lora.storage.staging import Staging, StagingFolder


class SetStore(SetFiles, Store):
    """A folder of sets, with a table of them. Thread-safe.

    The arguments are those of `SetFiles`.
    """

    def __init__(
        self, root: Path, *, max_open: int | None = None, shared: Path | None = None
    ) -> None:
        super().__init__(root, max_open=max_open, shared=shared)
        self.listing = Listing(root, self.read_record)
        """The table of all sets, for pages and sums."""
        self.jobs: JobRecords = JobFolder(root / "jobs")
        self.staging: Staging = StagingFolder(self)

    def list_names(self) -> list[str]:
        """Return the names of all sets, sorted."""
        names = (entry.name.removesuffix(SUFFIX) for entry in os.scandir(self._sets))
        return sorted(name for name in names if is_set_name(name))

    def records(self) -> list[SetRecord]:
        """Return the records of all sets, sorted by name.

        Leaves out sets that a newer release wrote.
        """
        return self.page([""], after="", base=None, limit=-1).records

    def page(self, starts: Iterable[str], *, after: str, base: str | None, limit: int) -> Page:
        """Return up to `limit` records (-1: all) of names that begin with one of `starts`."""
        return Page(
            self.listing.ask(lambda index: index.page(starts, after=after, base=base, limit=limit))
        )

    def largest(self, starts: Iterable[str], limit: int) -> Page:
        """Return up to `limit` records, the largest sets first."""
        return Page(self.listing.ask(lambda index: index.largest(starts, limit)))

    def sums(self, *starts: str) -> Sums:
        """Return the sums over the sets whose names begin with one of `starts`."""
        return self.listing.ask(lambda index: index.sums(*starts))

    def sums_of(self, name: str) -> Sums:
        """Return what one set adds to the sums."""
        return self.listing.ask(lambda index: index.sums_of(name))

    def lock_all(self) -> AbstractContextManager[None]:
        """Hold the lock to change the total of all sets; acquire it inside `lock`, if both."""
        return self.locked("all")

    def write(self, wanted: NextVersion, check: Callable[[], None] = allowed) -> StoredSet:
        """Write the next version of a set durably, and return it opened. Call with `lock` held.

        `check` raises if the set may not be written; the sums do not change between it and the
        write. Raises StoreFullError or StoreReadOnlyError, and then changes nothing.
        """
        name = wanted.name
        with self.lock_all(), storage_errors():
            check()
            with wanted.file(self) as file:
                self.commit(file, name)
        return self._open_version(name, self._identity(name))

    def add(self, file: BinaryIO, name: str) -> None:
        """Make a complete file of `new_file` that of a set. Call with `lock` held."""
        with self.lock_all():
            self.commit(file, name)

    def delete(self, name: str) -> None:
        """Delete a set durably; raises SetNotFoundError. Call with `lock` held."""
        with self.lock_all():
            self.remove(name)

    def release(self, name: str) -> None:
        """Release this process's state of a set; it is read again on next use."""
        self.forget(name)

    def newer_files(self) -> dict[str, int]:
        """Return the sizes in bytes, by set name, of files that a newer release wrote."""
        return self.listing.ask(SetIndex.newer_files)

    def dropped(self) -> Dropped:
        """Return what others put into the folder, a minute ago at the latest."""
        return self.listing.ask(SetIndex.dropped).plus(dropped_beside_sets(self.root))

    def maintain(self) -> None:
        """Find what others have put into the folder within a minute, and drop old uploads."""
        self.listing.compare(only_if_due=True)
        self.staging.expire()

    def _change(self, name: str, work: Callable[[], None]) -> None:
        self.listing.change(name, work)
