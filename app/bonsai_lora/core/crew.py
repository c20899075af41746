"""Threads that share out one apply.

A wake-up takes as long as a small apply: so the threads look out for more for a fraction of a
millisecond after each, as the threads of OpenMP do, and then sleep. By default there are none.
"""

import os
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np

from bonsai_lora.core.cast import address_of
from bonsai_lora.kernels.crew import SHARED_BYTES
from bonsai_lora.kernels.library import Apply, kernels

MOST_THREADS = 16
_PATIENCE = 20_000
"""Looks for work before a thread sleeps."""


class Crew:
    """So many threads, of which the caller is one; the others start with the first job."""

    def __init__(self, threads: int = 1) -> None:
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"expected 1 to {MOST_THREADS} threads, got {threads}")
        self.threads = threads
        self._lock = threading.Lock()
        self._wakes: list[threading.Lock] = []
        room = np.zeros(SHARED_BYTES + 128, np.uint8)
        self._room, self._shared = room, -(-address_of(room) // 128) * 128

    def apply(self, functions: Apply, job: Sequence[int]) -> float:
        """Do an apply with all threads, or alone where they are busy or cannot be had.

        `job` is what bonsai_lora.kernels.apply.ARGUMENTS says.
        """
        if self.threads == 1 or not self._lock.acquire(blocking=False):
            return functions.alone(*job)
        try:
            if not self._wakes and not self._start():
                return functions.alone(*job)
            made = kernels().crew()
            # 0, or NaN where x A^T is not finite; above 0 nothing is done yet and helpers sleep.
            result = made.share(self._shared, self.threads, functions.part, *job)
            if result > 0:
                try:
                    self._wake(int(result))
                finally:  # whatever comes between, those who are awake wait for the first part
                    result = made.finish(self._shared, self.threads)
            return result
        finally:
            self._lock.release()

    def _wake(self, sleepers: int) -> None:
        for part, wake in enumerate(self._wakes, 1):
            if sleepers >> part & 1:
                wake.release()

    def _start(self) -> bool:
        """Start the helpers; where not all can be started, have none."""
        kernels().crew()  # made now, so that no helper can fail to
        wakes = [threading.Lock() for _ in range(1, self.threads)]
        for wake in wakes:
            wake.acquire()
        try:
            for part, wake in enumerate(wakes, 1):
                target = partial(self._serve, part, self.threads, wake)
                threading.Thread(target=target, name="crew", daemon=True).start()
        except RuntimeError:  # no room for a thread: those that run find nothing to do, and sleep
            self.threads = 1
            return False
        self._wakes = wakes
        return True

    def _serve(self, part: int, threads: int, wake: threading.Lock) -> None:
        """Do one part of each job, until the process ends."""
        serve, seen = kernels().crew().serve, 0
        while True:
            seen = int(serve(self._shared, part, threads, seen, _PATIENCE))
            wake.acquire()


_crew = Crew()


def crew() -> Crew:
    """Return the crew of this process."""
    return _crew


def set_threads(threads: int) -> None:
    """Have so many threads share out each large apply in this process (1: none).

    For the start of a process: threads of an earlier number stay, asleep.
    """
    global _crew  # noqa: PLW0603 - a process has one
    if threads != _crew.threads:
        _crew = Crew(threads)


# A child process has none of its parent's threads.
os.register_at_fork(after_in_child=lambda: set_threads(1))
