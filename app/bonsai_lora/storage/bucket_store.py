"""A store of named sets in a bucket, shared by any number of machines.

    {prefix}/sets/{name}         pointer: the record of the current version, and which blob it is
    {prefix}/blobs/{hh}/{blob}   immutable; byte for byte the file of a set
    {prefix}/usage               sums over all sets
    {prefix}/staged/{key}        uploads that wait for their commits, as in `staging`
    {prefix}/index               which object of indexes/ has all records as of a time, by `gc`

A write puts the blob first and then changes the pointer by compare-and-swap, which decides between
writers. A reader asks for the pointer, at most every `stale_seconds`, and fetches the blob if the
copy on this machine is a different one. No clock decides the order of anything.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from io import BufferedRandom
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from bonsai_lora.errors import (
    BusyError,
    ChangedMeanwhileError,
    SetNotFoundError,
    StoreUnreachableError,
)
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.storage.bucket import Bucket, ConflictError, Found, open_bucket
from bonsai_lora.storage.bucket_jobs import BucketJobs
from bonsai_lora.storage.bucket_listing import BucketListing
from bonsai_lora.storage.bucket_reader import BucketReader
from bonsai_lora.storage.bucket_staging import BucketStaging
from bonsai_lora.storage.cache import Cache, Note
from bonsai_lora.storage.disk import storage_errors
from bonsai_lora.storage.freshness import Look, Looks
from bonsai_lora.storage.index import Sums
from bonsai_lora.storage.jobs import JobRecords
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.pointer import POINTERS, Pointer, encode_pointer
from bonsai_lora.storage.protocol import Page, Store, StoreState, allowed
from bonsai_lora.storage.setfile import SetRecord, StoredSet, record_of
from bonsai_lora.storage.staging import Staging
from bonsai_lora.storage.usage import Usage
from bonsai_lora.storage.verify import OnPiece

_THREADS = 16
_TRIES = 3
_PROBE_SECONDS = 15
_EXPIRE_SECONDS = 3600


def open_bucket_store(
    url: str,
    cache: Path,
    *,
    cache_bytes: int,
    stale_seconds: float,
    stale_if_error_seconds: float,
    shared: Path | None = None,
) -> "BucketStore":
    """Return the store at a URL; raises ValueError and OSError, but does not ask the bucket yet."""
    return BucketStore(
        open_bucket(url),
        Cache(cache, url, cache_bytes, shared=shared),
        stale_seconds=stale_seconds,
        stale_if_error_seconds=stale_if_error_seconds,
    )


class BucketStore(Store):
    """The sets of `bucket`, with copies in `cache`. Thread-safe."""

    def __init__(
        self,
        bucket: Bucket,
        cache: Cache,
        *,
        stale_seconds: float = 5.0,
        stale_if_error_seconds: float = 3600.0,
    ) -> None:
        self._bucket = bucket
        self.jobs: JobRecords = BucketJobs(bucket)
        self.staging: Staging = BucketStaging(bucket)
        self._cache = cache
        self._files = cache.files
        self.root, self.temporary = cache.files.root, cache.files.temporary
        self._looks = Looks(stale_seconds, stale_if_error_seconds, lambda: bucket.is_reachable)
        self._reader = BucketReader(bucket, cache, self._looks)
        self._threads = ThreadPoolExecutor(_THREADS, "bucket")
        self._listing = BucketListing(bucket, self._threads)
        self._usage = Usage(bucket, stale_seconds, self._listing.count)
        self._locked: dict[str, tuple[Pointer | None, str | None]] = {}
        """By name whose lock is held: the pointer and its ETag, which a write replaces."""
        self._expired_at = time.monotonic()

    @property
    def on_open(self) -> Callable[[SetRecord], None] | None:
        """Called with the record of each version that `read` opens."""
        return self._files.on_open

    @on_open.setter
    def on_open(self, call: Callable[[SetRecord], None] | None) -> None:
        self._files.on_open = call

    def read_quickly(self, name: str) -> StoredSet | None:
        """Return the set if it is on this machine and was compared lately; None if not.

        Nothing waits for the bucket.
        """
        now = time.monotonic()
        look = self._looks.fresh(name, now)
        if look is None or name in self._locked:
            return None
        if not look.exists:
            if self._cache.has(name):  # a different worker has created it meanwhile
                return None
            raise SetNotFoundError(name)
        self._look_beside(name, look)
        try:
            stored = self._files.read_quickly(name)
        except SetNotFoundError:  # evicted, or deleted by a different worker
            return None
        self._reader.counts["hits"] += stored is not None
        return stored

    def read(self, name: str) -> StoredSet:
        """Return the current version of a set, which is fetched if it is not on this machine."""
        for _ in range(_TRIES):
            self._look_up(name)
            try:
                return self._files.read(name)
            except SetNotFoundError:  # evicted or moved aside; the next look fetches it again
                self._looks.forget(name)
        raise BusyError(f"the copy of set {name!r} was removed three times; retry in a second")

    def read_record(self, name: str) -> SetRecord:
        """Return the record of a set; one that is not on this machine is not fetched for that."""
        if name in self._locked:
            pointer, _ = self._locked[name]
            if pointer is None or pointer.record is None:
                raise SetNotFoundError(name)
            return pointer.record
        return self.read(name).record if self._cache.has(name) else self._reader.read_record(name)

    def refresh(self, name: str) -> None:
        """Compare the pointer of a set with the bucket's now, and fetch the set if it changed."""
        self._reader.refresh(name)

    def verify(self, name: str, on_piece: OnPiece | None = None) -> SetRecord:
        """Read the copy of a set, and move it aside if it is damaged; it is fetched again then."""
        return self._files.verify(name, on_piece)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock to change `name` among the workers of this machine.

        Asks the bucket for the pointer, which a write then replaces.
        """
        if not is_set_name(name):
            raise SetNotFoundError(name)
        with self._cache.writing(name):
            found = self._bucket.get(f"{POINTERS}/{name}")
            self._locked[name] = (
                (None, None) if found is None else (self._reader.decode(name, found), found.etag)
            )
            try:
                yield
            finally:
                del self._locked[name]

    def new_file(self) -> AbstractContextManager[BinaryIO]:
        """Create a temporary file in `temporary`; it is removed on exit."""
        return self._files.new_file()

    def write(self, wanted: NextVersion, check: Callable[[], None] = allowed) -> StoredSet:
        """Write the next version of a set: sums, blob, pointer, then the copy. Call with `lock`."""
        name = wanted.name
        present, _ = self._locked[name]
        if wanted.previous != (present and present.record):
            raise ChangedMeanwhileError
        version = present.version + 1 if present else 1
        with storage_errors(), wanted.file(self._files, version) as file:
            self.add(file, name, check)
        return self.read(name)

    def add(self, file: BinaryIO, name: str, check: Callable[[], None] = allowed) -> None:
        """Make a complete file of `new_file` the current version of a set. Call with `lock` held.

        Raises as `write` does.
        """
        pointer = _pointer_of(name, file)
        self._cache.make_room(pointer.size)
        change = pointer.sums() - self.sums_of(name)
        self._usage.change(name, change, check)
        with self._undoing(name, change, StoreUnreachableError):
            self._bucket.write(pointer.blob, Path(str(file.name)))
        with storage_errors(), self._cache.settling(name):
            at, wall = time.monotonic(), time.time()
            # After a lost answer it may be the current version, or become it: `gc` corrects.
            with self._undoing(name, change, ChangedMeanwhileError):
                found = self._swap(name, pointer)
            self._cache.install(name, file, Note(found, wall))
            self._looks.note(name, self._looks.new(found, exists=True, at=at))
            self._locked[name] = pointer, found.etag

    def delete(self, name: str) -> None:
        """Leave a tombstone in place of the pointer. Call with `lock` held."""
        present, _ = self._locked.get(name, (None, None))
        if present is None or present.record is None:
            raise SetNotFoundError(name)
        tombstone = Pointer(present.uid, present.version, None)
        with storage_errors(), self._cache.settling(name):
            at = time.monotonic()
            found = self._swap(name, tombstone)
            self._cache.drop(name)
            self._looks.note(name, self._looks.new(found, exists=False, at=at))
            self._locked[name] = tombstone, found.etag
        with contextlib.suppress(StoreUnreachableError, ChangedMeanwhileError):
            self._usage.change(name, Sums() - present.sums(), allowed)

    def page(self, starts: Iterable[str], *, after: str, base: str | None, limit: int) -> Page:
        """Return up to `limit` records (-1: all) of names that begin with one of `starts`."""
        return self._listing.page(starts, after=after, base=base, limit=limit)

    def largest(self, starts: Iterable[str], limit: int) -> Page:
        """Return up to `limit` records of the index, the largest sets first."""
        return self._listing.largest(starts, limit)

    def sums(self, *starts: str) -> Sums:
        """Return the sums over the sets whose names begin with one of `starts`."""
        return self._usage.sums(*starts)

    def sums_of(self, name: str) -> Sums:
        """Return what one set adds to the sums."""
        if name in self._locked:
            pointer, _ = self._locked[name]
            return Sums() if pointer is None else pointer.sums()
        look = self._looks.get(name)
        if look is None or look.found is None:
            return Sums()
        return self._reader.decode(name, look.found).sums()

    def open_sets(self) -> list[StoredSet]:
        """Return the sets that this process has open; releases those that were evicted."""
        return self._files.open_sets()

    def keep(self, name: str) -> None:
        """Keep the copy of a set, for all workers, until `release`."""
        self._cache.keep(name)

    def release(self, name: str) -> None:
        """Let the copy of a set make room again; it is compared and opened again on next use."""
        self._looks.forget(name)
        self._files.forget(name)
        self._cache.release(name)

    def bad_files(self, most: int | None = None) -> dict[str, str]:
        """Return the reasons, by set name, of pointers, blobs and copies that cannot be used."""
        found = {**self._files.bad_files(most), **self._reader.bad}
        return dict(islice(found.items(), most))

    def count_bad_files(self) -> int:
        """Return the number of names of pointers, blobs and copies that cannot be used."""
        return self._files.count_bad_files() + len(self._reader.bad)

    def is_writable(self) -> bool:
        """Return whether this process can make copies."""
        return self._files.is_writable()

    def maintain(self) -> None:
        """Release maps of evicted copies, keep the cache small, drop old uploads, and probe."""
        self._files.open_sets()
        self._cache.trim()
        if time.monotonic() - self._expired_at > _EXPIRE_SECONDS:
            self._expired_at = time.monotonic()
            with contextlib.suppress(StoreUnreachableError):
                self.staging.expire()
        if time.time() - self._bucket.last_ok > _PROBE_SECONDS:
            with contextlib.suppress(StoreUnreachableError):
                self._bucket.get("usage")

    def state(self) -> StoreState:
        """Return how the bucket and the cache are doing."""
        counts = {
            **{f"requests_{kind}": number for kind, number in self._bucket.requests.items()},
            **{f"looks_{result}": number for result, number in self._looks.counts.items()},
            **self._reader.counts,
            "evictions": self._cache.evictions,
        }
        bucket = self._bucket
        return StoreState(bucket.is_reachable, bucket.last_ok, self._cache.bytes, counts)

    def close(self) -> None:
        """Stop looking beside requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look_up(self, name: str) -> None:
        """Make sure that the copy of a set may be acted on; raises SetNotFoundError.

        Who holds the lock acts on the version that a write would replace.
        """
        if name not in self._locked:
            self._look_beside(name, self._reader.look_up(name))
        elif self._cache.record(name) != self.read_record(name):
            self._reader.settle(name)

    def _look_beside(self, name: str, look: Look) -> None:
        """Take the next look in a thread, if it is due."""
        if self._looks.is_due_beside(name, look, time.monotonic()):
            with contextlib.suppress(RuntimeError):  # the store is closed
                self._threads.submit(self._looks.beside, name, self.refresh)

    @contextlib.contextmanager
    def _undoing(self, name: str, change: Sums, error: type[Exception]) -> Iterator[None]:
        """Change the sums back after an error, if the bucket answers; else `gc` corrects them."""
        try:
            yield
        except error:
            with contextlib.suppress(StoreUnreachableError, ChangedMeanwhileError):
                self._usage.change(name, Sums() - change, allowed)
            raise

    def _swap(self, name: str, pointer: Pointer) -> Found:
        """Replace the pointer that was read with the lock, or raise ChangedMeanwhileError."""
        body, (_, replaced) = encode_pointer(pointer), self._locked[name]
        try:
            etag = self._bucket.put(f"{POINTERS}/{name}", body, replaces=replaced)
        except ConflictError:
            raise ChangedMeanwhileError from None
        return Found(body, etag)


def _pointer_of(name: str, file: BinaryIO) -> Pointer:
    """Return the pointer to the content of a complete file of a set."""
    file.flush()
    file.seek(0)
    digest = hashlib.file_digest(cast("BufferedRandom", file), "sha256").hexdigest()
    size = file.tell()
    file.seek(0)
    record = record_of(Path(f"{name}.safetensors"), file)
    return Pointer(record.uid, record.version, record, size, digest)
