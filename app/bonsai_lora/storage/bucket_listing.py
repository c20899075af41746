"""Pages of the sets of a bucket: current ones from its pointers, filtered ones from the index."""

import contextlib
import string
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from itertools import islice

from bonsai_lora.errors import NewerFormatError, StoreUnreachableError, UnsupportedFeatureError
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.storage.bucket import Bucket, Listed, SameError
from bonsai_lora.storage.bucket_index import read_index
from bonsai_lora.storage.index import Row, SetIndex, Sums
from bonsai_lora.storage.pointer import (
    POINTERS,
    MalformedPointerError,
    Pointer,
    decode_pointer,
)
from bonsai_lora.storage.protocol import Page

_LETTERS = f"-.{string.digits}{string.ascii_uppercase}_{string.ascii_lowercase}"
"""What names consist of, in the order of their bytes."""
_LONGEST = 96
_REREAD_SECONDS = 30.0
_MOST_KNOWN = 1 << 13
_MOST_UNINDEXED = 10_000
_BATCH = 1000


class BucketListing:
    """The pointers of `bucket`, read by all of `threads` at a time. Thread-safe.

    The index is read again when `gc` has written a new one.
    """

    def __init__(self, bucket: Bucket, threads: Executor) -> None:
        self._bucket = bucket
        self._threads = threads
        self._known: dict[str, tuple[str, Pointer | None]] = {}
        """ETag and pointer by name."""
        self._lock = threading.Lock()
        self._index: tuple[SetIndex, str] | None = None
        self._index_etag: str | None = None
        self._index_due = 0.0

    def page(self, starts: Iterable[str], *, after: str, base: str | None, limit: int) -> Page:
        """Return up to `limit` records (-1: all) of names that begin with one of `starts`.

        Pages by base, and all records at once, are of the index.
        """
        indexed = self._indexed() if base is not None or limit < 0 else None
        if indexed is not None:
            index, as_of = indexed
            return Page(index.page(starts, after=after, base=base, limit=limit), as_of)
        records = (one.record for one in self.pointers(starts, after, limit) if one.record)
        if base is None and limit >= 0:
            return Page(list(islice(records, limit)))
        few = list(islice(records, _MOST_UNINDEXED + 1))
        if len(few) > _MOST_UNINDEXED:
            raise UnsupportedFeatureError(
                f"the store has more than {_MOST_UNINDEXED} sets and no index of them; run "
                "bonsai-lora gc, which makes it"
            )
        found = [one for one in few if base in (None, one.base_model_name)]
        return Page(found if limit < 0 else found[:limit])

    def largest(self, starts: Iterable[str], limit: int) -> Page:
        """Return up to `limit` records of the index, the largest sets first; none without one."""
        indexed = self._indexed()
        if indexed is None:
            return Page([])
        return Page(indexed[0].largest(starts, limit), indexed[1])

    def count(self, start: str) -> Sums:
        """Return the sums over the sets whose names begin with `start`, from their pointers."""
        return sum((one.sums() for one in self.pointers([start], "", _BATCH)), Sums())

    def pointers(self, starts: Iterable[str], after: str, batch: int) -> Iterator[Pointer]:
        """Yield the pointers of names that begin with one of `starts`, by name.

        `batch` at a time are read; those that cannot be used are left out.
        """
        size = batch if 0 < batch < _BATCH else _BATCH
        for start in filter(_may_start, sorted(starts)):
            first = max(after, _before(start))
            for listed in self._bucket.list(POINTERS, after=first, count=size):
                names = [one for one in listed if one.name.startswith(start)]
                found = self._threads.map(self._pointer, names)
                yield from (one for one in found if one is not None)
                if len(names) < len(listed):
                    break

    def _pointer(self, listed: Listed) -> Pointer | None:
        """Return a pointer, which is read only if it has changed since the last time."""
        known = self._known.get(listed.name)
        if known is not None and known[0] == listed.etag:
            return known[1]
        found = self._bucket.get(listed.key)
        pointer = None
        if found is not None:
            with contextlib.suppress(MalformedPointerError, NewerFormatError):
                pointer = decode_pointer(listed.name, found.body)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[listed.name] = found.etag, pointer
        return pointer

    def _indexed(self) -> tuple[SetIndex, str] | None:
        """Return the index and the time that it is of; None if there is none.

        While the bucket is away, or a new one is damaged, the one that was read last.
        """
        with self._lock:
            if time.monotonic() >= self._index_due:
                with contextlib.suppress(SameError, StoreUnreachableError, ValueError):
                    self._index = self._read_index()
                self._index_due = time.monotonic() + _REREAD_SECONDS
            return self._index

    def _read_index(self) -> tuple[SetIndex, str] | None:
        """Return the present index; raises SameError if it is the one that was read last."""
        opened = read_index(self._bucket, unless=self._index_etag)
        if opened is None:
            self._index_etag = None
            return None
        index = SetIndex(None, may_spill=True)
        with index.transaction():
            index.fill(
                Row(one.record.name, "", one.record, one.size)
                for _, _, one in opened.entries()
                if one.record is not None
            )
        self._index_etag = opened.etag
        return index, opened.as_of


def _may_start(start: str) -> bool:
    """Return whether a name can begin with `start`."""
    return start == "" or is_set_name(start)


def _before(start: str) -> str:
    """Return what sorts before all names that begin with `start`, and after the names before."""
    if not start:
        return ""
    place = _LETTERS.index(start[-1])
    return start[:-1] + (_LETTERS[place - 1] + "z" * _LONGEST if place else "")
