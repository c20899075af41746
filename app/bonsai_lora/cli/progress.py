"""The progress lines of downloads and jobs."""

import contextlib
import sys
import time
from typing import Self

_REFRESH_SECONDS = 0.1
_SHOWN_AFTER_SECONDS = 1.0


class _Line:
    """A line on standard error that is written over; silent unless that is a terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._is_shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._is_shown:
            with contextlib.suppress(OSError):
                print(file=sys.stderr)

    def _show(self, share: float, amount: str = "") -> None:
        """Show the share that is done, from 0 to 1, and the time left at the average rate."""
        seconds = time.monotonic() - self._started
        left = f", {seconds * (1 - share) / share:.0f} s left" if share else ""
        bar = "#" * round(30 * share)
        print(f"\r[{bar:<30}] {share:4.0%}{amount}{left} ", end="", file=sys.stderr, flush=True)
        self._is_shown = True


class ProgressLine(_Line):
    """The progress line of a transfer."""

    def __init__(self) -> None:
        super().__init__()
        self._done = self._total = 0
        self._shown = self._started

    def __exit__(self, *error: object) -> None:
        """Show the final state."""
        if self._is_terminal:
            self._show_bytes()
        super().__exit__(*error)

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Show new figures, at most ten times a second."""
        self._done, self._total = done_bytes, total_bytes
        now = time.monotonic()
        if self._is_terminal and now - self._shown > _REFRESH_SECONDS:
            self._shown = now
            self._show_bytes()

    def advance(self, total_bytes: int, more_bytes: int) -> None:
        """Show that there are so many bytes more."""
        self.update(self._done + more_bytes, total_bytes)

    def _show_bytes(self) -> None:
        rate = self._done / max(time.monotonic() - self._started, 1e-6)
        amount = f" {self._done / 1e6:.0f}/{self._total / 1e6:.0f} MB {rate / 1e6:.0f} MB/s"
        self._show(self._done / self._total if self._total else 1.0, amount)


class JobLine(_Line):
    """The progress line of a job, once it takes longer than a second; never if `is_silent`."""

    def __init__(self, *, is_silent: bool = False) -> None:
        super().__init__()
        self._is_terminal &= not is_silent

    def update(self, share: float) -> None:
        """Show the share that is done, from 0 to 1."""
        if self._is_terminal and time.monotonic() - self._started >= _SHOWN_AFTER_SECONDS:
            self._show(share)
