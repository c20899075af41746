"""The progress lines of downloads and jobs."""

import contextlib
import sys
import time
from typing import Self

_REFRESH_SECONDS = 0.1
_SHOWN_AFTER_SECONDS = 1.0


class ProgressLine:
    """A progress line on standard error; silent unless that is a terminal."""

    def __init__(self) -> None:
        self._done = self._total = 0
        self._started = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Print the final state and end the line."""
        if self._is_terminal:
            self._show()
            with contextlib.suppress(OSError):
                print(file=sys.stderr)

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Show new figures, at most ten times a second."""
        self._done, self._total = done_bytes, total_bytes
        now = time.monotonic()
        if self._is_terminal and now - self._shown > _REFRESH_SECONDS:
            self._shown = now
            self._show()

    def _show(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-6)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        share = self._done / self._total if self._total else 1.0
        bar = "#" * round(30 * share)
        print(
            f"\r[{bar:<30}] {share:4.0%} {self._done / 1e6:.0f}/{self._total / 1e6:.0f} MB "
            f"{rate / 1e6:.0f} MB/s, {left:.0f} s left ",
            end="",
            file=sys.stderr,
            flush=True,
        )


class JobLine:
    """A progress line of a job on standard error, once it takes longer than a second.

    Silent unless that is a terminal, and if `is_silent`.
    """

    def __init__(self, *, is_silent: bool = False) -> None:
        self._started = time.monotonic()
        self._is_silent = is_silent or not sys.stderr.isatty()
        self._is_shown = False

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End the line."""
        if self._is_shown:
            with contextlib.suppress(OSError):
                print(file=sys.stderr)

    def update(self, share: float) -> None:
        """Show the share that is done, from 0 to 1."""
        seconds = time.monotonic() - self._started
        if self._is_silent or seconds < _SHOWN_AFTER_SECONDS:
            return
        left = f", {seconds * (1 - share) / share:.0f} s left" if share else ""
        bar = "#" * round(30 * share)
        print(f"\r[{bar:<30}] {share:4.0%}{left} ", end="", file=sys.stderr, flush=True)
        self._is_shown = True
