"""Download the files of a model in parallel, with resume, verification and progress."""

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

STATE_FOLDER = ".bonsai-pull"
"""Hidden folder next to the files, with partial downloads and the tags of complete files."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file of a model and its paths on disk."""

    path: str
    size_bytes: int
    tag: str
    folder: Path

    @property
    def target(self) -> Path:
        return self.folder / Path(self.path).name

    @property
    def tag_file(self) -> Path:
        """Holds the tag of the complete file; missing while the file is being replaced."""
        return self.folder / STATE_FOLDER / f"{self.target.name}.tag"

    @property
    def partial(self) -> Path:
        """Has the tag in its name, so that parts of different versions are never joined."""
        return self.folder / STATE_FOLDER / f"{self.target.name}.{self.tag}.partial"

    def is_done(self) -> bool:
        return (
            self.tag_file.is_file()
            and self.tag_file.read_text("utf-8") == self.tag
            and self.target.is_file()
            and self.target.stat().st_size == self.size_bytes
        )

    def finish(self) -> None:
        self.tag_file.unlink(missing_ok=True)
        self.partial.replace(self.target)
        self.tag_file.write_text(self.tag, "utf-8")
        for stale in (self.folder / STATE_FOLDER).glob(f"{self.target.name}.*.partial"):
            stale.unlink(missing_ok=True)


def pull(
    client: httpx.Client,
    repo: str,
    commit: str,
    files: Sequence[dict[str, Any]],
    folder: Path,
    jobs: int,
) -> None:
    """Download `files` ({path, size, oid}) of `repo` at `commit` into `folder`.

    Complete files are kept, and partial downloads are resumed. Raises httpx.HTTPStatusError for an
    error response, ValueError for a file whose size or tag differs from the listing; other files
    are left as they are then.
    """
    (folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
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
        finally:  # all done, one failed, or Ctrl-C: stop the remaining downloads
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
    with client.stream("GET", url, headers=headers) as response:
        if response.is_error:
            response.read()
            response.raise_for_status()
        if response.headers.get("etag") != f'"{file.tag}"':
            raise ValueError(f"{file.path} changed while it was downloaded; run the command again")
        start = start if response.status_code == httpx.codes.PARTIAL_CONTENT else 0
        progress.add(start)
        with file.partial.open("ab" if start else "wb") as out:
            for block in response.iter_raw(1 << 20):
                if progress.stopped:
                    return
                out.write(block)
                progress.add(len(block))
    got = file.partial.stat().st_size
    if got != file.size_bytes:
        file.partial.unlink()
        raise ValueError(
            f"{file.path} has {got} bytes instead of {file.size_bytes}; run the command again"
        )
    file.finish()


class Progress:
    """A progress line on standard error; silent unless that is a terminal."""

    def __init__(self, total_bytes: int) -> None:
        self.stopped = False
        """Set to stop all downloads."""
        self._total = total_bytes
        self._done = 0
        self._lock = threading.Lock()
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

    def add(self, count: int) -> None:
        """Add `count` downloaded bytes."""
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
