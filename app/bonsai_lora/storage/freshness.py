"""What this process knows of the pointers of a bucket, and how long it may act on it.

A *look* compares the pointer of a set with the bucket's. Its result is used for the stale time
without asking, counted from when the request was made. Near the end of it, the next look is taken
beside the requests. While the bucket does not answer, the last result serves for longer, and looks
are taken beside the requests alone, so that no request waits for a timeout.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from bonsai_lora.errors import StoreUnreachableError
from bonsai_lora.storage.bucket import Found

_BESIDE = 0.8
"""Part of the stale time after which the next look is taken beside the requests."""
_RETRY_SECONDS = 1.0
"""How long after a look that failed the next one is taken."""
_MOST_LOOKS = 1 << 16
_LOCKS = 256


@dataclass(frozen=True, slots=True)
class Look:
    """The result of a look: the pointer's object, and whether there is a set."""

    found: Found | None
    exists: bool
    at: float
    """When the bucket was asked, on the monotonic clock."""
    beside_at: float
    """When the next look is due beside the requests."""
    until: float
    """When this one may not be used any more."""
    is_stale: bool = False
    """Whether a look failed since."""


class Looks:
    """The last look at each set. Thread-safe.

    `is_reachable` returns whether the last request to the bucket was answered.
    """

    def __init__(
        self,
        stale_seconds: float,
        stale_if_error_seconds: float,
        is_reachable: Callable[[], bool],
    ) -> None:
        self._is_reachable = is_reachable
        self._stale = stale_seconds
        self._stale_if_error = stale_if_error_seconds
        self._looks: dict[str, Look] = {}
        self._beside: set[str] = set()
        self._locks = [threading.RLock() for _ in range(_LOCKS)]
        self.counts: Counter[str] = Counter()
        """Looks by result: same, changed, gone, failed; and stale, results that were used late."""

    def get(self, name: str) -> Look | None:
        """Return the last look at a set, however old."""
        return self._looks.get(name)

    def fresh(self, name: str, now: float) -> Look | None:
        """Return the last look at a set if it may be acted on."""
        look = self._looks.get(name)
        if look is None or now >= look.until:
            return None
        if look.is_stale:
            if now >= look.beside_at and self._is_reachable():
                return None
            self.counts["stale"] += 1
        return look

    def is_due_beside(self, name: str, look: Look, now: float) -> bool:
        """Return whether to look beside the requests; True once for each look."""
        is_over = now >= look.until and not look.is_stale  # the next look is not beside any more
        if now < look.beside_at or is_over or name in self._beside:
            return False
        self._beside.add(name)
        return True

    def beside(self, name: str, look: Callable[[str], object]) -> None:
        """Take a look for which `is_due_beside` was true."""
        try:
            look(name)
        except Exception:  # noqa: BLE001 - whoever asks after the stale time gets the error
            return
        finally:
            self._beside.discard(name)

    def new(self, found: Found | None, *, exists: bool, at: float) -> Look:
        """Return the look that found this when the bucket was asked at `at`."""
        return Look(found, exists, at, at + _BESIDE * self._stale, at + self._stale)

    def note(self, name: str, look: Look) -> Look:
        """Keep and return a look."""
        if len(self._looks) >= _MOST_LOOKS:
            for one in list(self._looks)[: _MOST_LOOKS // 2]:
                self._looks.pop(one, None)
        self._looks.pop(name, None)
        self._looks[name] = look
        return look

    def forget(self, name: str) -> None:
        """Make the next look-up ask the bucket."""
        self._looks.pop(name, None)

    def once(self, name: str, asked: float, look: Callable[[], Look]) -> Look:
        """Return the result of `look`, or of one that a different thread took after `asked`."""
        with self._locks[hash(name) % _LOCKS]:
            known = self._looks.get(name)
            if known is not None and known.at >= asked and not known.is_stale:
                return known
            return look()

    def fail(self, name: str, last: Look | None, error: StoreUnreachableError) -> Look:
        """Return what serves after a look that failed; raises `error` if nothing does."""
        self.counts["failed"] += 1
        usable = self.usable(name, last)
        if usable is None:
            raise error
        return usable

    def usable(self, name: str, last: Look | None) -> Look | None:
        """Return `last` for as long as it may be used while the bucket is away, if it still may."""
        now = time.monotonic()
        if last is None or not last.exists or now >= last.at + self._stale_if_error:
            return None
        self.counts["stale"] += 1
        until = last.at + self._stale_if_error
        stale = replace(last, beside_at=now + _RETRY_SECONDS, until=until, is_stale=True)
        return self.note(name, stale)
