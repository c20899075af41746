"""Threads that share out one apply.

Work of 50 µs is not worth a wake-up, which takes as long: so they look out for more for a
millisecond after each, as the threads of OpenMP do, and then sleep. By default there are none.
"""

import os
import threading
from collections.abc import Sequence

import numpy as np

from app.core.cast import address_of
from app.kernels.crew import SHARED_BYTES
from app.kernels.library import Apply, kernels

MOST_THREADS = 16
_PATIENCE = 20_000
"""Looks for work before a thread sleeps."""


class Crew:
    """So many threads, of which the caller is one; the others start with the first job."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._wakes: list[threading.Lock] = []
        room = np.zeros(SHARED_BYTES + 128, np.uint8)
        self._room, self._shared = room, -(-address_of(room) // 128) * 128

    def apply(self, functions: Apply, job: Sequence[int]) -> float:
        """Do an apply with all threads, or alone where they are busy with another.

        `job` is what app.kernels.apply.ARGUMENTS says.
        """
        if not self._lock.acquire(blocking=False):
            return functions.alone(*job)
        try:
            if not self._wakes:
                self._start()
            crew = kernels().crew()
            result = crew.share(self._shared, self.threads, functions.part, *job)
            if result > 0:
                sleepers = int(result)
                for part, wake in enumerate(self._wakes, 1):
                    if sleepers >> part & 1:
                        wake.release()
                result = crew.finish(self._shared, self.threads)
            return result
        finally:
            self._lock.release()

    def _start(self) -> None:
        for part in range(1, self.threads):
            wake = threading.Lock()
            wake.acquire()
            self._wakes.append(wake)
            arguments = part, wake
            threading.Thread(target=self._serve, args=arguments, name="crew", daemon=True).start()

    def _serve(self, part: int, wake: threading.Lock) -> None:
        """Do one part of each job, until the process ends."""
        serve, seen = kernels().crew().serve, 0
        while True:
            seen = int(serve(self._shared, part, self.threads, seen, _PATIENCE))
            wake.acquire()


_crew = Crew()


def crew() -> Crew:
    """Return the crew of this process."""
    return _crew


def set_threads(threads: int) -> None:
    """Have so many threads share out each large apply in this process (1: none)."""
    global _crew  # noqa: PLW0603 - a process has one
    if threads != _crew.threads:
        _crew = Crew(threads)


# A child process has none of its parent's threads.
os.register_at_fork(after_in_child=lambda: set_threads(1))
