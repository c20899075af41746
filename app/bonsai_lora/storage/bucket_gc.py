"""Collect what nobody needs from a bucket, count its sets again, and write its index.

A blob may go if it is older than the grace and no pointer names it: blobs are listed before the
pointers are read, and a writer names its blob within minutes. Ages are by the bucket's clock alone.
"""

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import BinaryIO

from bonsai_lora.errors import NewerFormatError
from bonsai_lora.storage.bucket import Bucket, Listed
from bonsai_lora.storage.bucket_index import FOLDER, Entry, read_index, write_index
from bonsai_lora.storage.bucket_staging import BucketStaging
from bonsai_lora.storage.index import Sums
from bonsai_lora.storage.pointer import (
    BLOBS,
    POINTERS,
    MalformedPointerError,
    Pointer,
    decode_pointer,
)
from bonsai_lora.storage.usage import Usage

_THREADS = 16
_CORRECTIONS = 3


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` found and did."""

    sums: Sums
    blobs: int
    """Blobs that were removed."""
    blob_bytes: int
    tombstones: int
    """Tombstones that were removed."""
    kept_tombstones: int
    """Those that are old enough, but the bucket has no conditional delete."""
    unreadable: list[str]
    """Names whose pointers cannot be used; as long as there are any, no blob is removed."""
    is_corrected: bool
    """Whether the sums were counted again; not if others kept writing."""
    staged: int
    """Uploads without a commit that were removed."""


def collect(bucket: Bucket, file: BinaryIO, grace: timedelta) -> Collected:
    """Remove blobs and tombstones older than `grace`, correct the sums, and write the index.

    `file` is an empty temporary file for the index.
    """
    as_of = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    before = bucket.now() - grace
    old_blobs = [one for one in bucket.list_all(BLOBS) if one.modified < before]
    with ThreadPoolExecutor(_THREADS, "gc") as threads:
        is_corrected, entries, times, unreadable = _corrected(bucket, threads)
        named = {pointer.blob for _, _, pointer in entries if pointer.record is not None}
        orphans = [] if unreadable else [one for one in old_blobs if one.key not in named]
        list(threads.map(bucket.delete, [one.key for one in orphans]))
        tombs = [
            (name, etag)
            for name, etag, pointer in entries
            if pointer.record is None and times[name] < before
        ]
        removed = _remove_tombstones(bucket, threads, tombs)
    entries = [one for one in entries if one[0] not in removed]
    key = write_index(bucket, file, entries, as_of)
    for one in bucket.list_all(FOLDER):
        if one.modified < before and one.key != key:
            bucket.delete(one.key)
    return Collected(
        _sums(entries, ""),
        len(orphans),
        sum(one.size for one in orphans),
        len(removed),
        len(tombs) - len(removed),
        unreadable,
        is_corrected,
        BucketStaging(bucket).expire(),
    )


def _corrected(
    bucket: Bucket, threads: Executor
) -> tuple[bool, list[Entry], dict[str, datetime], list[str]]:
    """Read all pointers until the sums do not change meanwhile, and replace them by counted ones.

    Returns whether that succeeded, the pointers, their times of change, and those without use.
    """
    usage = Usage(bucket, 0, lambda _: Sums())
    known = _known(bucket)
    is_corrected = False
    for _ in range(_CORRECTIONS):
        sums = usage.read()
        entries, times, unreadable = _read_all(bucket, threads, known)
        known = {name: (etag, pointer) for name, etag, pointer in entries}
        is_corrected = usage.correct(sums, partial(_sums, entries)) is not None
        if is_corrected:
            break
    return is_corrected, entries, times, unreadable


def _known(bucket: Bucket) -> dict[str, tuple[str, Pointer]]:
    """Return the pointers of the last index by name, with their ETags."""
    index = read_index(bucket)
    if index is None:
        return {}
    try:
        return {name: (etag, pointer) for name, etag, pointer in index.entries()}
    except ValueError:  # damaged; a new one is about to be written
        return {}


def _read_all(
    bucket: Bucket, threads: Executor, known: dict[str, tuple[str, Pointer]]
) -> tuple[list[Entry], dict[str, datetime], list[str]]:
    entries: list[Entry] = []
    times: dict[str, datetime] = {}
    unreadable: list[str] = []

    def read(listed: Listed) -> Entry | str | None:
        present = known.get(listed.name)
        if present is not None and present[0] == listed.etag:
            return listed.name, *present
        found = bucket.get(listed.key)
        try:
            if found is None:
                return None
            return listed.name, found.etag, decode_pointer(listed.name, found.body)
        except (MalformedPointerError, NewerFormatError):
            return listed.name

    for chunk in bucket.list(POINTERS):
        for listed, one in zip(chunk, threads.map(read, chunk), strict=True):
            if isinstance(one, str):
                unreadable.append(one)
            elif one is not None:
                entries.append(one)
                times[one[0]] = listed.modified
    return entries, times, unreadable


def _remove_tombstones(bucket: Bucket, threads: Executor, tombs: list[tuple[str, str]]) -> set[str]:
    """Remove tombstones, unless they change at that moment; return the names."""
    if not tombs or not bucket.has_delete_if():
        return set()

    def remove(tomb: tuple[str, str]) -> bool:
        return bucket.delete_if(f"{POINTERS}/{tomb[0]}", tomb[1])

    done = threads.map(remove, tombs)
    return {name for (name, _), is_done in zip(tombs, done, strict=True) if is_done}


def _sums(entries: list[Entry], start: str) -> Sums:
    return sum((one.sums() for name, _, one in entries if name.startswith(start)), Sums())
