"""Memory and disk space that requests take while they are served, counted before it is taken."""

import math
import threading
import time
from typing import Self

from bonsai_lora.errors import BonsaiLoraError, BusyError, MemoryBudgetError


class Budget:
    """Bytes that all requests in this process may hold at a time; thread-safe.

    `what` names them in error texts, and `setting` the setting that limits them. `never` is the
    error for a request that needs more than the whole budget.
    """

    def __init__(
        self,
        total_bytes: int,
        what: str = "memory",
        setting: str = "work_memory_bytes",
        never: type[BonsaiLoraError] = MemoryBudgetError,
    ) -> None:
        self.total_bytes = total_bytes
        self.reserved_bytes = 0
        self.crowded_at = -math.inf
        """When a request was last refused because others held too much (monotonic)."""
        self._what = what
        self._setting = setting
        self._never = never
        self._lock = threading.Lock()

    def check(self, size: int) -> None:
        """Raise the error `never` if `size` bytes are more than the budget."""
        if size > self.total_bytes:
            raise self._never(
                f"the request needs {size} bytes of {self._what} at once, but the limit is "
                f"{self.total_bytes}; request less at once, or raise {self._setting}",
                needed_bytes=size,
                budget_bytes=self.total_bytes,
            )

    def reserve(self, size: int) -> None:
        """Count `size` bytes until they are released.

        Raises as `check`, and BusyError if they do not fit now.
        """
        self.check(size)
        if not self.try_reserve(size):
            self.crowded_at = time.monotonic()
            raise BusyError(
                f"the request needs {size} bytes of {self._what}, but other requests hold "
                f"{self.reserved_bytes} of {self.total_bytes}; retry in a second",
                needed_bytes=size,
                reserved_bytes=self.reserved_bytes,
                budget_bytes=self.total_bytes,
            )

    def try_reserve(self, size: int) -> bool:
        """Count `size` bytes if they fit now; return whether they do."""
        with self._lock:
            fits = self.reserved_bytes + size <= self.total_bytes
            if fits:
                self.reserved_bytes += size
            return fits

    def release(self, size: int) -> None:
        """Stop counting `size` bytes."""
        with self._lock:
            self.reserved_bytes -= size


class Reservation:
    """Bytes of a budget that grow while its context lasts, and are released at its end."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._size = 0

    def add(self, size: int) -> None:
        """Reserve `size` more bytes; raises the errors of `Budget.reserve`."""
        self.budget.reserve(size)
        self._size += size

    def try_add(self, size: int) -> bool:
        """Reserve `size` more bytes if they fit now; return whether they do."""
        fits = self.budget.try_reserve(size)
        self._size += size if fits else 0
        return fits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.budget.release(self._size)
