"""Token buckets, which bound how much a key uses per second."""

import math
import threading
from collections.abc import Callable
from time import monotonic


class TokenBucket:
    """Lets `rate` units per second through, after a pause up to one second's worth at once.

    An amount larger than a second's worth passes when the bucket is full, and leaves a debt that
    later ones wait for. Thread-safe.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = monotonic) -> None:
        self._rate = rate
        self._most = max(rate, 1.0)
        self._held = self._most
        self._clock = clock
        self._at = clock()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, rate: float | None, share: float) -> "TokenBucket | None":
        """Return a bucket for a share of `rate`; None without a rate."""
        return None if rate is None else cls(rate * share)

    def take(self, amount: float) -> int:
        """Take `amount` and return 0; if it is not there, return the whole seconds to wait."""
        with self._lock:
            now = self._clock()
            self._held = min(self._most, self._held + (now - self._at) * self._rate)
            self._at = now
            needed = min(amount, self._most)
            if self._held < needed:
                return math.ceil((needed - self._held) / self._rate)
            self._held -= amount
            return 0
