"""Downloading the files of a model: several at once, resumed, checked, with progress."""

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

MARKS = ".bonsai-pull"
"""Hidden folder beside the files: what is partly there, and which content the whole files have."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file of a model, where it goes, and where its pieces are kept meanwhile."""

    path: str
    size_bytes: int
    tag: str
    folder: Path

    @property
    def target(self) -> Path:
        return self.folder / Path(self.path).name

    @property
    def mark(self) -> Path:
        """Holds the tag of the finished file; not there while that is being replaced."""
        return self.folder / MARKS / f"{self.target.name}.tag"

    @property
    def partial(self) -> Path:
        """Carries the tag in its name, so that no two contents can ever be joined."""
        return self.folder / MARKS / f"{self.target.name}.{self.tag}.partial"

    def is_done(self) -> bool:
        return (
            self.mark.is_file()
            and self.mark.read_text("utf-8") == self.tag
            and self.target.is_file()
            and self.target.stat().st_size == self.size_bytes
        )

    def finish(self) -> None:
        self.mark.unlink(missing_ok=True)
        self.partial.replace(self.target)
        self.mark.write_text(self.tag, "utf-8")
        for stale in (self.folder / MARKS).glob(f"{self.target.name}.*.partial"):
            stale.unlink(missing_ok=True)


def pull(
    client: httpx.Client,
    repo: str,
    commit: str,
    files: Sequence[dict[str, Any]],
    folder: Path,
    jobs: int,
) -> None:
    """Write `files` ({path, size, oid}) of `repo` at `commit` into `folder`.

    A file that is there whole is kept; one that is there in part goes on where it stopped. Raises
    httpx.HTTPStatusError for a refusal, ValueError for a file that came out with another size or
    tag than announced; the other files are left as they are then.
    """
    (folder / MARKS).mkdir(parents=True, exist_ok=True)
    wanted = [_File(one["path"], one["size"], one["oid"], folder) for one in files]
    progress = Progress(sum(one.size_bytes for one in wanted))
    threads = ThreadPoolExecutor(max(1, jobs))
    with progress:
        futures = [
            threads.submit(
                _fetch, client, f"/{repo}/resolve/{commit}/{quote(one.path)}", one, progress
            )
            for one in wanted
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # all done, one failed, or Ctrl-C: whatever still runs is to end soon
            progress.stopped = True
            threads.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def _fetch(client: httpx.Client, url: str, file: _File, progress: "Progress") -> None:
    if file.is_done():
        progress.add(file.size_bytes)
        return
    start = file.partial.stat().st_size if file.partial.is_file() else 0
    headers = {"Accept-Encoding": "identity"}
    if 0 < start < file.size_bytes:
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file.tag}"'}
    with client.stream("GET", url, headers=headers) as answer:
        if answer.is_error:
            answer.read()
            answer.raise_for_status()
        if answer.headers.get("etag") != f'"{file.tag}"':
            raise ValueError(f"{file.path} changed while it was downloaded; run it again")
        start = start if answer.status_code == httpx.codes.PARTIAL_CONTENT else 0
        progress.add(start)
        with file.partial.open("ab" if start else "wb") as out:
            for block in answer.iter_raw(1 << 20):
                if progress.stopped:
                    return
                out.write(block)
                progress.add(len(block))
    got = file.partial.stat().st_size
    if got != file.size_bytes:
        file.partial.unlink()
        raise ValueError(f"{file.path} came with {got} bytes, expected {file.size_bytes}")
    file.finish()


class Progress:
    """A line on a terminal: done, rate, time left; nothing where there is no terminal."""

    def __init__(self, total_bytes: int) -> None:
        self.stopped = False
        """Set to make all downloads end soon."""
        self._total = total_bytes
        self._done = 0
        self._lock = threading.Lock()
        self._started = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Leave the last line standing."""
        if self._is_terminal:
            self._show()
            with contextlib.suppress(OSError):
                print(file=sys.stderr)

    def add(self, count: int) -> None:
        """Count bytes that are there now."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._is_terminal and now - self._shown > 0.1:
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
