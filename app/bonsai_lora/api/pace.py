"""Whether a client keeps up: it must send or read at least 1 KiB per second."""

from collections.abc import Callable

from bonsai_lora.errors import StalledError

LEAST_BYTES_PER_SECOND = 1 << 10
_IN_A_CROWD = 64
"""How many times as much it must move while others are refused because of slow clients."""


class Pace:
    """Counts the time that a client was waited for, and the bytes that moved meanwhile.

    The client is too slow if fewer than `needed_bytes` move in `stall_seconds` of waiting; that is
    1 KiB per second, or 64 while it `is_crowded`. The last bytes, which may be fewer, have as long.
    """

    __slots__ = ("_is_crowded", "_moved", "left_seconds", "needed_bytes", "stall_seconds")

    def __init__(self, stall_seconds: float, is_crowded: Callable[[], bool]) -> None:
        self.stall_seconds = stall_seconds
        self.needed_bytes = max(1, int(LEAST_BYTES_PER_SECOND * stall_seconds))
        self.left_seconds = stall_seconds
        """How long the client may take for the bytes that are still missing."""
        self._moved = 0
        self._is_crowded = is_crowded

    def note(self, waited_seconds: float, moved: int) -> None:
        """Count `moved` bytes, for which the client was waited for."""
        self._moved += moved
        self.left_seconds -= waited_seconds
        if self._moved >= self.needed_bytes and (
            self._moved >= _IN_A_CROWD * self.needed_bytes or not self._is_crowded()
        ):
            self._moved = 0
            self.left_seconds = self.stall_seconds

    def too_slow(self) -> StalledError:
        """Return the error for a client that sends too slowly."""
        if self._moved < self.needed_bytes:
            reason = f"fewer than {self.needed_bytes} bytes in {self.stall_seconds:g} s"
        else:
            reason = f"{self._moved} bytes in {self.stall_seconds:g} s while others had to wait"
        return StalledError(
            f"the client sent {reason}; retry on a faster connection, or raise stall_seconds"
        )
