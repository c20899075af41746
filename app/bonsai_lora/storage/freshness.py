"""What this process knows of the pointers of a bucket, and how long it may act on it.

A *look* compares the pointer of a set with the bucket's. Its result is used for the stale time
without asking, counted from when the request was made. Near the end of it, the next look is taken
beside the requests. While the bucket does not answer, the last result serves for longer.
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
"""How long a result is used after a look that failed, before the next one."""
_MOST_LOOKS = 1 << 16
_LOCKS = 256


@dataclass(frozen=True, slots=True)
class Look:
    """The result of a look: the pointer's object, and whether there is a set."""

    found: Found | None
    exists: bool
    at: float
    """When the bucket was asked, on the monotonic clock."""
    until: float
    """When the next look is due."""
    is_stale: bool = False
    """Whether the stale time has passed, and the bucket did not answer since."""


class Looks:
    """The last look at each set. Thread-safe."""

    def __init__(self, stale_seconds: float, stale_if_error_seconds: float) -> None:
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
            self.counts["stale"] += 1
        return look

    def is_due_beside(self, name: str, look: Look, now: float) -> bool:
        """Return whether to look beside the requests; True once for each look."""
        if look.is_stale or now < look.at + _BESIDE * self._stale or name in self._beside:
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
        return Look(found, exists, at, at + self._stale)

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

    def go_on(self, name: str, last: Look | None, error: StoreUnreachableError) -> Look:
        """Return `last` for a little longer, if that is not too old; else raise `error`."""
        self.counts["failed"] += 1
        now = time.monotonic()
        if last is None or not last.exists or now >= last.at + self._stale_if_error:
            raise error
        until = min(now + _RETRY_SECONDS, last.at + self._stale_if_error)
        self.counts["stale"] += 1
        return self.note(name, replace(last, until=until, is_stale=True))
