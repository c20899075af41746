"""Copies of the sets of a bucket on one machine, shared by the workers of a service.

The folder is that of `SetFiles`, with a *note* for each copy: the pointer that it belongs to, and
as its time of modification when the pointer was last compared with the bucket's. So workers share
comparisons, a service that restarts while the bucket is away goes on, and the copy that was longest
without a comparison is the least recently used one. A copy is put in place before its note, and
both change under a lock.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bonsai_lora.errors import SetNotFoundError, StoreFullError
from bonsai_lora.storage.bucket import Found
from bonsai_lora.storage.cache_folder import KEPT, claim
from bonsai_lora.storage.files import SUFFIX, SetFiles
from bonsai_lora.storage.pointer import MalformedPointerError, Pointer
from bonsai_lora.storage.setfile import SetRecord, record_of

_LOCKS = 4096
_RECOUNT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Note:
    """A pointer as it was read from the bucket."""

    found: Found
    checked: float
    """Unix time at which the comparison with the bucket began."""


class Cache:
    """Copies of sets of the bucket at `url`, in up to `most_bytes` bytes. Thread-safe.

    `shared` is that of `SetFiles`. Raises ValueError if the folder is of a different bucket, or of
    no bucket.
    """

    def __init__(
        self,
        root: Path,
        url: str,
        most_bytes: int,
        *,
        max_open: int | None = None,
        shared: Path | None = None,
    ) -> None:
        claim(root, url)
        self.files = SetFiles(root, max_open=max_open, shared=shared)
        self._copies = root / "sets"
        self._notes = root / "notes"
        self._notes.mkdir(exist_ok=True)
        self._kept = root / KEPT
        """Has an empty file for each set whose copy never makes room."""
        self._kept.mkdir(exist_ok=True)
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._counted_at = -_RECOUNT_SECONDS
        self.bytes = 0
        """Size of all copies, as far as this process knows."""
        self.evictions = 0
        self._count()

    def writing(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock to change a set in the bucket, across the workers of this machine."""
        return self.files.locked(f"write-{_stripe(name)}")

    def settling(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock to change the copy of a set; acquire it inside `writing`, if both."""
        return self.files.locked(f"copy-{_stripe(name)}")

    def has(self, name: str) -> bool:
        """Return whether there is a copy of a set."""
        return (self._copies / f"{name}{SUFFIX}").exists()

    def record(self, name: str) -> SetRecord | None:
        """Return the record of the copy of a set."""
        try:
            return self.files.read_record(name)
        except SetNotFoundError:
            return None

    def note(self, name: str) -> Note | None:
        """Return the note of a copy."""
        path = self._notes / name
        try:
            etag, _, body = path.read_bytes().partition(b"\n")
            return Note(Found(body, etag.decode()), path.stat().st_mtime)
        except (OSError, ValueError):
            return None

    def put_note(self, name: str, note: Note) -> None:
        """Write the note of a copy; without one, the copy is only compared sooner."""
        with contextlib.suppress(OSError), self.files.new_file() as file:
            file.write(note.found.etag.encode() + b"\n" + note.found.body)
            file.flush()
            os.utime(file.fileno(), (note.checked, note.checked))
            Path(file.name).rename(self._notes / name)

    def touch(self, name: str, checked: float) -> None:
        """Note that a copy was compared with the bucket."""
        with contextlib.suppress(OSError):
            os.utime(self._notes / name, (checked, checked))

    def keep(self, name: str) -> None:
        """Remove no copy of a set to make room, until `release`."""
        (self._kept / name).touch()

    def release(self, name: str) -> None:
        """End `keep`."""
        (self._kept / name).unlink(missing_ok=True)

    def make_room(self, size: int) -> None:
        """Remove the least recently used copies until `size` more bytes fit.

        Raises StoreFullError if they never do.
        """
        if size > self._most_bytes:
            raise StoreFullError(
                f"the set has {size} bytes, but the cache of the bucket takes {self._most_bytes}; "
                "raise cache_bytes"
            )
        with self._lock:
            self.bytes += size
            if self.bytes <= self._most_bytes:
                return
            self._evict(size)
            if self.bytes > self._most_bytes:
                self.bytes -= size
                raise StoreFullError(
                    f"the set has {size} bytes, and the cache is full of sets that are kept; "
                    "unload some, or raise cache_bytes"
                )

    def trim(self) -> None:
        """Count the copies again, as other workers change them, and remove what is too much."""
        with self._lock:
            if time.monotonic() - self._counted_at >= _RECOUNT_SECONDS:
                self._evict(0)

    def install(self, name: str, file: BinaryIO, note: Note) -> None:
        """Put a complete file of `SetFiles.new_file` in place. Call with `settling` held."""
        self.files.commit(file, name)
        self.put_note(name, note)

    def drop(self, name: str) -> None:
        """Remove a copy, if there is one. Call with `settling` held."""
        with contextlib.suppress(SetNotFoundError):
            self.files.remove(name)
        (self._notes / name).unlink(missing_ok=True)

    def _count(self) -> dict[str, int]:
        sizes = {}
        for entry in os.scandir(self._copies):
            with contextlib.suppress(OSError):
                sizes[entry.name.removesuffix(SUFFIX)] = entry.stat().st_size
        self.bytes = sum(sizes.values())
        self._counted_at = time.monotonic()
        return sizes

    def _evict(self, more: int) -> None:
        """Remove the copies whose comparison is oldest, until all and `more` bytes fit."""
        sizes = self._count()
        self.bytes += more
        if self.bytes <= self._most_bytes:
            return
        kept = {path.name for path in self._kept.iterdir()}
        used = {name: self._used(name) for name in sizes if name not in kept}
        for name in sorted(used, key=used.__getitem__):
            if self.bytes <= self._most_bytes:
                return
            # Without the lock of the copy: whoever puts a newer one in place misses it, at worst.
            (self._copies / f"{name}{SUFFIX}").unlink(missing_ok=True)
            (self._notes / name).unlink(missing_ok=True)
            self.files.forget(name)
            self.bytes -= sizes[name]
            self.evictions += 1

    def _used(self, name: str) -> float:
        try:
            return (self._notes / name).stat().st_mtime
        except OSError:
            return 0.0


def receive_blob(file: BinaryIO, pieces: Iterator[bytes], pointer: Pointer) -> None:
    """Write a blob to `file` as it comes in.

    Raises MalformedPointerError unless it is the blob of the pointer, and errors of `record_of`.
    """
    digest, received = hashlib.sha256(), 0
    for piece in pieces:
        received += len(piece)
        digest.update(piece)
        file.write(piece)
    if received != pointer.size or digest.hexdigest() != pointer.sha256:
        raise MalformedPointerError(
            f"its blob {pointer.blob} does not have {pointer.size} bytes with the SHA-256 "
            f"{pointer.sha256}"
        )
    file.flush()
    file.seek(0)
    name = "" if pointer.record is None else pointer.record.name
    if record_of(Path(f"{name}{SUFFIX}"), file) != pointer.record:
        raise MalformedPointerError(f"its blob {pointer.blob} has a different record")


def _stripe(name: str) -> str:
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=2).digest(), "big")
    return f"{number % _LOCKS:04}"
