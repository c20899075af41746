"""Downloading the files of a model: several at once, resumed, checked, with progress."""

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx

_PARTIAL = ".partial"


def pull(
    client: httpx.Client,
    repo: str,
    commit: str,
    files: Sequence[dict[str, Any]],
    folder: Path,
    jobs: int,
) -> None:
    """Write `files` ({path, size, oid}) of `repo` at `commit` into `folder`.

    A file that is there whole is kept; a `.partial` one goes on where it stopped, if it is of the
    same content. Raises httpx.HTTPStatusError for a refusal, ValueError for a file that came out
    with another size or tag than announced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(sum(one["size"] for one in files))
    with progress, ThreadPoolExecutor(max(1, jobs)) as threads:
        futures = [
            threads.submit(
                _fetch, client, f"/{repo}/resolve/{commit}/{one['path']}", one, folder, progress
            )
            for one in files
        ]
        for future in futures:
            future.result()


def _fetch(
    client: httpx.Client, url: str, about: dict[str, Any], folder: Path, progress: "Progress"
) -> None:
    target = folder / Path(about["path"]).name
    mark = target.with_name(target.name + ".etag")
    partial = target.with_name(target.name + _PARTIAL)
    etag = f'"{about["oid"]}"'
    known = mark.read_text("utf-8") if mark.is_file() else None
    if known == etag and target.is_file() and target.stat().st_size == about["size"]:
        progress.add(about["size"])
        return
    start = partial.stat().st_size if known == etag and partial.is_file() else 0
    mark.write_text(etag, "utf-8")
    headers = {"Range": f"bytes={start}-", "If-Range": etag} if 0 < start < about["size"] else {}
    with client.stream("GET", url, headers=headers) as answer:
        if answer.is_error:
            answer.read()
            answer.raise_for_status()
        if answer.headers["etag"] != etag:
            raise ValueError(f"{about['path']} changed while it was downloaded; run it again")
        start = start if answer.status_code == httpx.codes.PARTIAL_CONTENT else 0
        progress.add(start)
        with partial.open("ab" if start else "wb") as file:
            for block in answer.iter_raw(1 << 20):
                file.write(block)
                progress.add(len(block))
    if partial.stat().st_size != about["size"]:
        raise ValueError(
            f"{about['path']} came with {partial.stat().st_size} bytes, expected {about['size']}"
        )
    partial.replace(target)


class Progress:
    """A line on a terminal: done, rate, time left; nothing where there is no terminal."""

    def __init__(self, total_bytes: int) -> None:
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
