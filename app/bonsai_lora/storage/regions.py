"""System shared-memory regions (Triton's extension system_shared_memory).

A region is a range of a file in /dev/shm that a client on this machine created. It is accessed by
pread(2) and pwrite(2), never memory-mapped: if a client truncates its file, a read returns fewer
bytes, whereas touching a mapping would kill the process with SIGBUS. Reading a copy also means
that the client cannot change the data between validation and use.

Registrations are small files in a folder that all workers of a service share; each worker opens a
region on first use. A client's file is never removed.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bonsai_lora.errors import (
    BonsaiLoraError,
    InvalidRequestError,
    RegionNotFoundError,
    TooManyFilesError,
    UnsupportedFeatureError,
    is_out_of_files,
)
from bonsai_lora.formats.safetensors import as_bytes
from bonsai_lora.wire.oip import Placement

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory

MAX_REGIONS = 1024

_KEY = re.compile(r"/?([A-Za-z0-9._-]{1,250})\Z")
_PREFIX = "region-"
_PATTERN = "region-*"
_SEMAPHORE = "sem."
"""Prefix of the C library's semaphores, which are in the same folder."""


@dataclass(frozen=True, slots=True)
class Region:
    """A registered range of a shared-memory file."""

    name: str
    key: str
    offset: int
    byte_size: int
    identity: tuple[int, int]
    """Device and inode of the registered file."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of bytes in a file."""

    identity: tuple[int, int]
    start: int
    stop: int

    def overlaps(self, other: "Span") -> bool:
        """Return whether the spans share a byte."""
        return (
            self.identity == other.identity and self.start < other.stop and other.start < self.stop
        )


def _disabled() -> BonsaiLoraError:
    return UnsupportedFeatureError(
        "shared memory is disabled; start the service with --shared-memory"
    )


class SharedRegions:
    """The regions of a service. Thread-safe.

    With `folder` None, every method raises the error of `refusal`: by default, that shared memory
    is disabled.
    """

    def __init__(
        self, folder: Path | None, refusal: Callable[[], BonsaiLoraError] = _disabled
    ) -> None:
        self._folder = folder
        self._refusal = refusal
        self._open: dict[str, tuple[tuple[int, int], Region, _File]] = {}
        if folder is not None:
            folder.mkdir(exist_ok=True)

    @property
    def is_on(self) -> bool:
        """Whether shared memory is enabled."""
        return self._folder is not None

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register `byte_size` bytes at `offset` of the file `key` as the region `name`.

        Raises InvalidRequestError if the name is in use, the key is invalid, the file does not
        exist, or it is too short.
        """
        path = self._path(name)
        if len(self.registered()) >= MAX_REGIONS:
            raise InvalidRequestError(
                f"there are already {MAX_REGIONS} shared memory regions, which is the limit; "
                "unregister some",
                limit=MAX_REGIONS,
            )
        file = _File(key)
        file.check(offset, byte_size)
        region = Region(name, key, offset, byte_size, file.identity)
        new = path.with_name(f"new-{secrets.token_hex(8)}")
        try:
            new.write_text(json.dumps(asdict(region)), encoding="utf-8")
            registered = _registration(new.stat())
            path.hardlink_to(new)  # atomic, and fails if the name is in use
            self._remember(name, registered, region, file)
        except FileExistsError:
            raise InvalidRequestError(
                f"shared memory region '{name}' already in manager; unregister it first",
                region=name,
            ) from None
        finally:
            new.unlink(missing_ok=True)

    def unregister(self, name: str) -> None:
        """Remove a registration, if it exists; the client's file is kept."""
        self._path(name).unlink(missing_ok=True)
        self._open.pop(name, None)

    def registered(self) -> list[Region]:
        """Return all regions, sorted by name."""
        found = []
        for path in self._require_on().glob(_PATTERN):
            with contextlib.suppress(FileNotFoundError):
                found.append(_decode(path.read_text(encoding="utf-8")))
        return sorted(found, key=lambda region: region.name)

    def get(self, name: str) -> Region:
        """Return a region; raises RegionNotFoundError."""
        try:
            return _decode(self._path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise _not_found(name) from None

    def span_to_write(self, placed: Placement, needed: int) -> "Span":
        """Return the span of the first `needed` bytes of a placement.

        Raises the errors of `read`, and InvalidRequestError if the region is read-only.
        """
        file, start = self._find(placed)
        if not file.is_writable:
            raise InvalidRequestError(
                f"shared memory region '{placed.region}' is not writable by this service; change "
                "the permissions of its file",
                region=placed.region,
            )
        return Span(file.identity, start, start + needed)

    def read(self, placed: Placement) -> memoryview:
        """Return a copy of the bytes of a placement.

        Raises RegionNotFoundError, InvalidRequestError if it is not within the region or the file
        has become shorter.
        """
        file, start = self._find(placed)
        buffer = as_bytes(np.empty(placed.byte_size, np.uint8))
        done = 0
        while done < len(buffer):
            count = os.preadv(file.descriptor, [buffer[done:]], start + done)
            if count == 0:
                raise InvalidRequestError(
                    f"shared memory region '{placed.region}' became shorter while it was read; "
                    "keep its size until the response arrives",
                    region=placed.region,
                )
            done += count
        return buffer

    def write(self, placed: Placement, data: memoryview) -> None:
        """Write `data` at the start of a placement; raises the errors of `read`."""
        file, start = self._find(placed)
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(file.descriptor, data[done:], start + done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG):
                raise InvalidRequestError(
                    f"shared memory region '{placed.region}' cannot be written: {error.strerror}; "
                    "free shared memory",
                    region=placed.region,
                ) from None
            raise

    def _find(self, placed: Placement) -> tuple["_File", int]:
        """Return the file of a placement and its offset in the file."""
        path = self._path(placed.region)
        try:
            status = os.stat(path)  # noqa: PTH116 - on the hot path
        except FileNotFoundError:
            self._open.pop(placed.region, None)
            raise _not_found(placed.region) from None
        known = self._open.get(placed.region)
        registered = _registration(status)
        if known is None or known[0] != registered:
            region = self.get(placed.region)
            known = (registered, region, _File(region.key, region.identity))
            self._remember(placed.region, *known)
        _, region, file = known
        if placed.offset + placed.byte_size > region.byte_size:
            raise InvalidRequestError(
                f"Invalid offset + byte size for shared memory region: '{region.name}' has "
                f"{region.byte_size} bytes, not {placed.byte_size} at offset {placed.offset}; "
                "request a range within the region",
                region=region.name,
            )
        start = region.offset + placed.offset
        file.check(start, placed.byte_size)
        return file, start

    def _remember(
        self, name: str, registered: tuple[int, int], region: Region, file: "_File"
    ) -> None:
        """Keep a region open, and close those that other workers have unregistered."""
        for other in list(self._open):
            if not self._path(other).exists():
                self._open.pop(other, None)
        self._open[name] = (registered, region, file)

    def _path(self, name: str) -> Path:
        return _registration_path(self._require_on(), name)

    def _require_on(self) -> Path:
        if self._folder is None:
            raise self._refusal()
        return self._folder


class _File:
    """An open shared-memory file, closed when it is garbage-collected."""

    def __init__(self, key: str, identity: tuple[int, int] | None = None) -> None:
        matched = _KEY.match(key)
        if matched is None or matched[1] in (".", "..") or matched[1].startswith(_SEMAPHORE):
            raise InvalidRequestError(
                f"Unable to open shared memory region: {key[:100]!r} is not a valid key; expected "
                "a name as for shm_open, such as '/name': at most 250 letters, digits, '.', '_' "
                "and '-', and not a semaphore"
            )
        self._key = key
        self.descriptor, self.is_writable = _open(SHARED_MEMORY / matched[1], key)
        status = os.fstat(self.descriptor)
        self.identity = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequestError(
                f"Unable to open shared memory region: '{key}' is not a regular file; create it "
                "with shm_open"
            )
        if identity not in (None, self.identity):
            raise InvalidRequestError(
                f"Unable to open shared memory region: '{key}' has been replaced since it was "
                "registered; unregister the region and register it again"
            )

    def check(self, offset: int, byte_size: int) -> None:
        """Raise InvalidRequestError unless the file has these bytes now."""
        length = os.fstat(self.descriptor).st_size
        if offset + byte_size > length:
            raise InvalidRequestError(
                f"shared memory '{self._key}' has {length} bytes, not {byte_size} at offset "
                f"{offset}; use a range within the file"
            )

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def _open(path: Path, key: str) -> tuple[int, bool]:
    """Return a file descriptor, and whether it is writable."""
    # O_NONBLOCK: opening a named pipe must not wait for its other end.
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            return os.open(path, os.O_RDWR | flags), True
        except PermissionError:
            return os.open(path, os.O_RDONLY | flags), False
    except OSError as error:
        if is_out_of_files(error):
            raise TooManyFilesError from None
        raise InvalidRequestError(
            f"Unable to open shared memory region: '{key}': {error.strerror}; create it with "
            "shm_open, readable by the service"
        ) from None


@lru_cache(maxsize=MAX_REGIONS)
def _registration_path(folder: Path, name: str) -> Path:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16)
    return folder / f"{_PREFIX}{digest.hexdigest()}"


def _registration(status: os.stat_result) -> tuple[int, int]:
    """Return an identity that differs between two registrations of the same name."""
    return status.st_ino, status.st_mtime_ns


def _decode(text: str) -> Region:
    fields: dict[str, Any] = json.loads(text)
    return Region(**{**fields, "identity": tuple(fields["identity"])})


def _not_found(name: str) -> RegionNotFoundError:
    return RegionNotFoundError(
        f"Unable to find shared memory region: '{name[:200]}'; register it first",
        region=name[:200],
    )
