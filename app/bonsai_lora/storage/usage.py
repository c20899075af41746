"""Sums over the sets of a bucket, in one small object that every write changes.

It has the sums over all sets and over each start of a name that was asked for, as quotas do. They
are changed before a set is written, and changed back if it is not: a process that dies in between
leaves them too high, until `gc` counts again.
"""

import json
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bonsai_lora.errors import ChangedMeanwhileError, StoreUnreachableError
from bonsai_lora.storage.bucket import Bucket, ConflictError, Found
from bonsai_lora.storage.index import Sums

_KEY = "usage"
_TRIES = 12
_PAUSE_SECONDS = 0.02

SumsByStart = dict[str, Sums]
Count = Callable[[str], Sums]
"""Counts the sets whose names begin with a start, from their pointers."""


@dataclass(frozen=True, slots=True)
class _Read:
    sums: SumsByStart
    etag: str | None
    at: float
    """When it was asked for, on the monotonic clock."""


class Usage:
    """The sums of a bucket, read again after `fresh_seconds`. Thread-safe.

    `count` counts what the object does not have.
    """

    def __init__(self, bucket: Bucket, fresh_seconds: float, count: Count) -> None:
        self._bucket = bucket
        self._fresh_seconds = fresh_seconds
        self._count = count
        self._last: _Read | None = None
        self._lock = threading.RLock()

    def sums(self, *starts: str) -> Sums:
        """Return the sums over names that begin with one of `starts`.

        While the bucket is away, those of the last answer.
        """
        with self._lock:
            try:
                if self._last is None or time.monotonic() - self._last.at > self._fresh_seconds:
                    self._last = self._read()
                return sum(map(self._sums, starts), Sums())
            except StoreUnreachableError:
                known = {} if self._last is None else self._last.sums
                return sum((known.get(start, Sums()) for start in starts), Sums())

    def change(self, name: str, change: Sums, check: Callable[[], None]) -> None:
        """Add `change` to the sums of every start of `name`, unless `check` raises.

        `check` sees the sums that are changed. Raises ChangedMeanwhileError after many conflicts.
        """
        for number in range(_TRIES):
            with self._lock:  # one writer of this process at a time
                self._last = self._read()
                check()
                self._sums("")  # counts them if this is the first write
                sums = {
                    start: one + change if name.startswith(start) else one
                    for start, one in self._last.sums.items()
                }
                try:
                    self._write(sums, self._last.etag)
                except ConflictError:
                    pass
                else:
                    return
            time.sleep(random.uniform(0, _PAUSE_SECONDS * 2 ** min(number, 5)))  # noqa: S311
        raise ChangedMeanwhileError

    def correct(self, known: SumsByStart, counted: Count) -> SumsByStart | None:
        """Replace the sums by counted ones, if they are still `known`; return these."""
        with self._lock:
            read = self._read()
            if read.sums != known:
                return None
            sums = {start: counted(start) for start in {"", *known}}
            try:
                self._write(sums, read.etag)
            except ConflictError:
                return None
            return sums

    def read(self) -> SumsByStart:
        """Return the present sums by start."""
        return self._read().sums

    def _read(self) -> _Read:
        started = time.monotonic()
        found = self._bucket.get(_KEY)
        return _Read(
            {} if found is None else _decode(found), found.etag if found else None, started
        )

    def _write(self, sums: SumsByStart, etag: str | None) -> None:
        started = time.monotonic()
        body = {"format": 1, "nonce": secrets.token_hex(8)}
        text = json.dumps({**body, "sums": {start: asdict(one) for start, one in sums.items()}})
        etag = self._bucket.put(_KEY, text.encode(), replaces=etag)
        self._last = _Read(sums, etag, started)

    def _sums(self, start: str) -> Sums:
        """Return the sums of a start, which are counted and kept if they are asked for first."""
        assert self._last is not None
        known = self._last.sums.get(start)
        if known is not None:
            return known
        counted = self._count(start)
        try:
            self._write({**self._last.sums, start: counted}, self._last.etag)
        except ConflictError:  # kept the next time
            self._last = self._read()
            self._last.sums.setdefault(start, counted)
        return counted


def _decode(found: Found) -> SumsByStart:
    """Return the sums in the object; none if it is not one, so that they are counted again."""
    try:
        fields = json.loads(found.body)["sums"]
        return {
            str(start): Sums(**{k: int(v) for k, v in one.items()}) for start, one in fields.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError):
        return {}
