"""What the service asks of a store: `store.SetStore`, a folder, or `bucket_store.BucketStore`."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from bonsai_lora.storage.dropped import Dropped
from bonsai_lora.storage.index import Sums
from bonsai_lora.storage.jobs import JobRecords
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.setfile import SetRecord, StoredSet
from bonsai_lora.storage.staging import Staging
from bonsai_lora.storage.verify import OnPiece


def allowed() -> None:
    """Allow a write: the default of its `check`."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the sets."""

    records: list[SetRecord]
    as_of: str | None = None
    """When the index that was read was made (RFC 3339); None if the page is current."""


@dataclass(frozen=True, slots=True)
class StoreState:
    """How a store that is elsewhere is doing; a folder has nothing to report."""

    is_reachable: bool | None = None
    last_ok: float = 0.0
    """Unix time of the last answer of the store."""
    cache_bytes: int = 0
    counts: Mapping[str, float] = field(default_factory=dict)
    """Totals since the start of this process; `api/metrics.py` explains them."""


class Store(Protocol):
    """Named sets. Thread-safe; all methods raise StoreUnreachableError if the store is away.

    A folder inherits what only a bucket has to do, or to report.
    """

    root: Path
    """Folder on this machine, also for what other modules keep beside the sets."""
    temporary: Path
    """Folder for temporary files of requests."""
    jobs: JobRecords
    """The records of jobs, for all processes that share the store."""
    staging: Staging
    """Uploads that wait for the commit that names them."""
    on_open: Callable[[SetRecord], None] | None
    """Called with the record of each version that `read` opens."""

    def read(self, name: str) -> StoredSet:
        """Return the current version of a set; raises SetNotFoundError, NewerFormatError."""

    def read_quickly(self, name: str) -> StoredSet | None:
        """Return `read(name)`, or None if that may take long."""

    def read_record(self, name: str) -> SetRecord:
        """Return the record of a set; raises SetNotFoundError, NewerFormatError."""

    def refresh(self, name: str) -> None:  # noqa: ARG002 - nothing to do for a folder
        """Make the next look-up of `name` see all changes that were made before this call."""
        return

    def verify(self, name: str, on_piece: OnPiece | None = None) -> SetRecord:
        """Read the file of a set on this machine, and move it aside if it is damaged."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock to change `name`."""

    def new_file(self) -> AbstractContextManager[BinaryIO]:
        """Create a temporary file in `temporary`; it is removed on exit."""

    def write(self, wanted: NextVersion, check: Callable[[], None] = allowed) -> StoredSet:
        """Write the next version of a set durably. Call with `lock` held.

        Raises ChangedMeanwhileError if a different process has changed the set, and what `check`
        raises.
        """

    def add(self, file: BinaryIO, name: str) -> None:
        """Make a complete file of `new_file` that of a set; raises as `write` does."""

    def delete(self, name: str) -> None:
        """Delete a set durably; raises as `write` does, and SetNotFoundError."""

    def page(self, starts: Iterable[str], *, after: str, base: str | None, limit: int) -> Page:
        """Return up to `limit` records (-1: all) of names that begin with one of `starts`."""

    def largest(self, starts: Iterable[str], limit: int) -> Page:
        """Return up to `limit` records, the largest sets first."""

    def sums(self, *starts: str) -> Sums:
        """Return the sums over the sets whose names begin with one of `starts`."""

    def sums_of(self, name: str) -> Sums:
        """Return what one set adds to the sums."""

    def open_sets(self) -> list[StoredSet]:
        """Return the sets that this process has open."""

    def keep(self, name: str) -> None:  # noqa: ARG002 - nothing to do for a folder
        """Keep the copy of a set on this machine, for all workers, until `release`."""
        return

    def release(self, name: str) -> None:
        """End `keep`, and release this process's state of a set; it is read again on next use."""

    def bad_files(self, most: int | None = None) -> dict[str, str]:
        """Return the reasons, by set name, of up to `most` files that cannot be read."""

    def count_bad_files(self) -> int:
        """Return the number of names of files that cannot be read."""

    def newer_files(self) -> dict[str, int]:
        """Return the sizes in bytes, by set name, of files that a newer release wrote."""
        return {}

    def dropped(self) -> Dropped:
        """Return what others put into the store's folder, from which no adapter is imported."""
        return Dropped()

    def is_writable(self) -> bool:
        """Return whether this process may change sets."""

    def maintain(self) -> None:
        """Do what is due every few seconds."""

    def state(self) -> StoreState:
        """Return how the store is doing."""
        return StoreState()

    def close(self) -> None:
        """Stop work in the background."""
        return
