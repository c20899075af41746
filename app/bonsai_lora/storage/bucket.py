"""Objects in a bucket of Google Cloud Storage or Azure, or in an S3-compatible one, by obstore.

Small objects are compared and swapped by their ETag. Large ones are immutable: written once under a
name of their own, and read in pieces. Whatever keeps the bucket from answering is a
StoreUnreachableError; for a second after one, others follow at once, so that nobody waits in line
for timeouts.
"""

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import obstore
from obstore import exceptions as failures
from obstore.store import AzureStore, GCSStore, S3Store, from_url

from bonsai_lora.errors import StoreUnreachableError
from bonsai_lora.validation import shown

_log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
_PART_BYTES = 8 << 20
_AHEAD = 4
"""Pieces that are read ahead and parts that are written at once: 16 and 32 MiB of memory."""
_MOST_FETCHES = 8
"""Large objects that are read at once."""
_MOST_SMALL_BYTES = 4 << 20
_SMALL_SECONDS, _LARGE_SECONDS = "5s", "60s"
_DOWN_SECONDS = 1.0
_RETRY: Any = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=50), "base": 2},
}
_LOST = (failures.AlreadyExistsError, failures.PreconditionError, FileNotFoundError)
"""Refusals of a conditional write: of a new object, of a changed one, and of one that is gone."""


class ConflictError(Exception):
    """An object is not what a conditional write expected."""


class _NoBucketError(Exception):
    """There is no such bucket; a missing object looks like that only to who reads it."""


class SameError(Exception):
    """An object has not changed since it was read."""


@dataclass(frozen=True, slots=True)
class Found:
    """The content of a small object."""

    body: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Listed:
    """An object as a listing shows it."""

    key: str
    etag: str
    size: int
    modified: datetime
    """By the clock of the bucket."""

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]


class Bucket:
    """The objects below a prefix. Thread-safe; all methods raise StoreUnreachableError.

    `large` is the same store with longer timeouts.
    """

    def __init__(self, small: Any, large: Any | None = None) -> None:
        self._small = small
        self._large = small if large is None else large
        self._lock = threading.Lock()
        self._fetches = threading.BoundedSemaphore(_MOST_FETCHES)
        self.requests: Counter[str] = Counter()
        """Requests by kind: get, list, put, delete; a large object counts once."""
        self.last_ok = 0.0
        """Unix time of the last answer."""
        self._last_error = self._down_until = 0.0

    @property
    def is_reachable(self) -> bool:
        """Whether the last request was answered."""
        return self.last_ok >= self._last_error

    def get(self, key: str, *, unless: str | None = None) -> Found | None:
        """Return a small object, None if there is none; raises SameError if `unless` is its ETag.

        The body of an object that is too large is empty.
        """
        options: Any = {} if unless is None else {"if_none_match": unless}
        with self._asking("get"):
            try:
                answer = obstore.get(self._small, key, options=options)
                body = b"" if answer.meta["size"] > _MOST_SMALL_BYTES else bytes(answer.bytes())
                return Found(body, answer.meta["e_tag"] or "")
            except FileNotFoundError:
                return None
            except failures.NotModifiedError:
                raise SameError from None

    def put(self, key: str, body: bytes, *, replaces: str | None) -> str:
        """Write a small object that replaces the one with this ETag (None: no object).

        Returns its ETag. Raises ConflictError if a different one is there. After an error it is
        read again: the answer may have been lost, and `body` is different each time.
        """
        mode: Any = "create" if replaces is None else {"e_tag": replaces}
        try:
            with self._asking("put"):
                try:
                    return obstore.put(self._small, key, body, mode=mode)["e_tag"] or ""
                except _LOST as error:
                    if replaces is None and isinstance(error, FileNotFoundError):
                        raise _NoBucketError(str(error)) from error
                    raise ConflictError(key) from error
        except (ConflictError, StoreUnreachableError) as error:
            if error.__cause__ is None or isinstance(error.__cause__, _NoBucketError):
                raise  # it was not sent, or not lost
            self._down_until = 0.0
            found = self.get(key)
            if found is not None and found.body == body:
                return found.etag
            raise

    def write(self, key: str, path: Path) -> None:
        """Write the large object `key` from a file."""
        with self._asking("put"), _in_bucket():
            obstore.put(self._large, key, path, chunk_size=_PART_BYTES, max_concurrency=_AHEAD)

    def pieces(self, key: str, size: int) -> Iterator[bytes]:
        """Yield a large object in pieces, nothing unless it has `size` bytes.

        Raises FileNotFoundError.
        """
        with self._fetches:
            if size > PIECE_BYTES:
                yield from self._many_pieces(key, size)
                return
            with self._asking("get"):
                answer = obstore.get(self._large, key)
                body = bytes(answer.bytes()) if answer.meta["size"] == size else b""
            yield body

    def _many_pieces(self, key: str, size: int) -> Iterator[bytes]:
        with self._asking("get"):
            length = obstore.head(self._large, key)["size"]
        if length != size:
            return

        def read(start: int) -> bytes:
            end = min(start + PIECE_BYTES, size)
            with self._asking(None):
                return bytes(obstore.get_range(self._large, key, start=start, end=end))

        starts = iter(range(0, size, PIECE_BYTES))
        with ThreadPoolExecutor(_AHEAD, "fetch") as threads:
            reading = deque(threads.submit(read, start) for start in islice(starts, _AHEAD))
            while reading:
                yield reading.popleft().result()
                reading.extend(threads.submit(read, start) for start in islice(starts, 1))

    def list(
        self, folder: str, *, after: str = "", count: int = 1000
    ) -> Iterator[Sequence[Listed]]:
        """Yield the objects in `folder` by name, from the first after `after`, `count` at a time.

        Each thousand costs a request.
        """
        with self._asking("list"), _in_bucket():
            chunks = obstore.list(
                self._small, folder, offset=f"{folder}/{after}" if after else None, chunk_size=count
            )
            chunk: Any = next(chunks, [])
        while chunk:
            yield [
                Listed(one["path"], one["e_tag"] or "", one["size"], one["last_modified"])
                for one in chunk
            ]
            with self._asking("list"), _in_bucket():
                chunk = next(chunks, [])

    def list_all(self, folder: str) -> Iterator[Listed]:
        """Yield all objects in `folder`, by name."""
        for chunk in self.list(folder):
            yield from chunk

    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""
        with self._asking("delete"), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._small, key)

    def now(self) -> datetime:
        """Return the time by the clock of the bucket, which writes an object to ask for it."""
        with self._asking("put"), _in_bucket():
            obstore.put(self._small, "probes/clock", b"clock")
            return obstore.head(self._small, "probes/clock")["last_modified"]

    def delete_if(self, key: str, etag: str) -> bool:
        """Delete an object if it has this ETag; return whether it was deleted.

        obstore has no conditional delete, so it signs a request that httpx sends. Only a store for
        which `has_delete_if` is true may be trusted with it.
        """
        with self._asking("delete"):
            url = obstore.sign(self._small, "DELETE", key, timedelta(seconds=60))
            answer = httpx.delete(url, headers={"If-Match": etag}, timeout=10)
            return answer.is_success

    def has_delete_if(self) -> bool:
        """Return whether the bucket honors the condition of `delete_if`: it refuses a wrong one."""
        if not isinstance(self._small, S3Store | GCSStore | AzureStore):
            return False
        key = "probes/delete"
        with self._asking("put"), _in_bucket():
            obstore.put(self._small, key, b"probe")
        wrongly = self.delete_if(key, '"00000000000000000000000000000000"')
        found = self.get(key)
        if wrongly or found is None:
            return False
        return self.delete_if(key, found.etag) and self.get(key) is None

    @contextlib.contextmanager
    def _asking(self, kind: str | None) -> Iterator[None]:
        """Count a request and note whether it is answered."""
        if time.monotonic() < self._down_until:
            raise _unreachable()
        if kind is not None:
            with self._lock:
                self.requests[kind] += 1
        try:
            yield
        except (failures.BaseError, httpx.HTTPError, TimeoutError, _NoBucketError) as error:
            if self.is_reachable:
                # Not for callers: it names addresses and keys.
                _log.warning("the bucket does not answer: %s", str(error).partition("\n")[0])
            self._last_error = time.time()
            self._down_until = time.monotonic() + _DOWN_SECONDS
            raise _unreachable() from error
        except (FileNotFoundError, ConflictError, SameError):
            self.last_ok = time.time()
            raise
        if not self.is_reachable:
            _log.warning("the bucket answers again")
        self.last_ok = time.time()


@contextlib.contextmanager
def _in_bucket() -> Iterator[None]:
    """Raise _NoBucketError if something is missing: a write or a listing needs only the bucket."""
    try:
        yield
    except FileNotFoundError as error:
        raise _NoBucketError(str(error).partition("\n")[0]) from error


def open_bucket(url: str) -> Bucket:
    """Return the bucket at a URL such as s3://bucket/prefix; raises ValueError.

    Credentials, region and endpoint are those that AWS_*, GOOGLE_* or AZURE_* variables name, or
    those of the machine.
    """
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ValueError(
            f"the store {shown(url)} has a password, which belongs in a variable; expected such "
            "as s3://bucket/prefix"
        )
    try:
        small, large = (_open(url, seconds) for seconds in (_SMALL_SECONDS, _LARGE_SECONDS))
    except (failures.BaseError, ValueError) as error:
        raise ValueError(
            f"the store {shown(url)} cannot be opened: {str(error).partition(chr(10))[0]}; "
            "expected such as s3://bucket/prefix"
        ) from None
    return Bucket(small, large)


def _open(url: str, timeout: str) -> Any:
    # Whether the connection is encrypted is the choice of whoever named the endpoint.
    options: Any = {"allow_http": True, "connect_timeout": "3s", "timeout": timeout}
    open_url: Any = from_url  # its overloads are by kind of store, which the URL decides
    return open_url(url, client_options=options, retry_config=_RETRY)


def _unreachable() -> StoreUnreachableError:
    return StoreUnreachableError(
        "the bucket of the store does not answer; retry later, or look into the log of the service"
    )
