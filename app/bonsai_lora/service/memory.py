"""Memory that requests take while they are served, counted before it is allocated."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bonsai_lora.errors import BusyError, MemoryBudgetError


class WorkMemory:
    """Bytes of bodies, responses and new matrices that this process may hold at a time."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.reserved_bytes = 0
        self._lock = threading.Lock()

    def reserve(self, size: int) -> None:
        """Count `size` bytes until they are released.

        Raises MemoryBudgetError if they could never fit, BusyError if they do not fit now.
        """
        if size > self.budget_bytes:
            raise MemoryBudgetError(
                f"the request needs {size} bytes of memory at once, but requests may use "
                f"{self.budget_bytes}; request less at once, or raise work_memory_bytes",
                needed_bytes=size,
                budget_bytes=self.budget_bytes,
            )
        with self._lock:
            if self.reserved_bytes + size > self.budget_bytes:
                raise BusyError(
                    f"the request needs {size} bytes of memory, but other requests use "
                    f"{self.reserved_bytes} of {self.budget_bytes}; retry in a second",
                    needed_bytes=size,
                    reserved_bytes=self.reserved_bytes,
                    budget_bytes=self.budget_bytes,
                )
            self.reserved_bytes += size

    def release(self, size: int) -> None:
        """Stop counting `size` bytes."""
        with self._lock:
            self.reserved_bytes -= size

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes while the context lasts."""
        self.reserve(size)
        try:
            yield
        finally:
            self.release(size)
