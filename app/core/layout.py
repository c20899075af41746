"""Matrices laid out as the products want them, within a bound.

A product of few rows with a matrix runs up to seven times as fast when the matrix lies in memory
column by column (benchmarks/apply.py). A set's file holds them row by row and is shared by all
processes, so such copies are private memory: they are made while there is room, and the rest is
computed from the file.
"""

import threading
import weakref

import numpy as np

from app.core.cast import FLOAT32, Array, Floats, to_float32

ROOM_BYTES = 256 << 20


class Room:
    """Bytes that copies may take in this process; what owns them gives them back when it goes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, owner: object, size: int) -> bool:
        """Take `size` bytes for as long as `owner` lives; return False where they are not there."""
        with self._lock:
            if self._taken + size > self.max_bytes:
                return False
            self._taken += size
        weakref.finalize(owner, self._give_back, size)
        return True

    def _give_back(self, size: int) -> None:
        # No lock: the garbage collector may run this while the same thread is in `take`.
        self._taken -= size


ROOM = Room(ROOM_BYTES)


def column_major(matrix: Array) -> Floats:
    """Return a float32 copy of `matrix`, column by column in memory; itself where it is that."""
    if matrix.dtype == FLOAT32:
        return np.asfortranarray(matrix)
    # Cast as it lies, which is fast, then turned.
    return np.asfortranarray(to_float32(matrix))
