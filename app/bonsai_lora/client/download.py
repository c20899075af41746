"""Download the files of a model in parallel, with resume and verification."""

import glob
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import httpx

from bonsai_lora.client.answers import PulledFile
from bonsai_lora.client.call import Call

if TYPE_CHECKING:
    from bonsai_lora.client.blocking import Client

STATE_FOLDER = ".bonsai-pull"
"""Hidden folder next to the files, with partial downloads and the tags of complete files."""

_WAIT_SECONDS = 0.5

OnProgress = Callable[[int, int], object]
"""Gets the bytes that are there and the total; called from several threads, one at a time."""


RestOf = Callable[[str, int, str], Call[Any]]
"""Gets the path of a file, a start and a tag; returns the call for the rest of the file from there
if it still has the tag, else for all of it."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file of a model and its paths on disk."""

    path: str
    size_bytes: int
    tag: str
    folder: Path

    @property
    def target(self) -> Path:
        return self.folder / self.path

    @property
    def tag_file(self) -> Path:
        """Holds the tag of the complete file; missing while the file is being replaced."""
        return self.folder / STATE_FOLDER / f"{self.path}.tag"

    @property
    def partial(self) -> Path:
        """Has the tag in its name, so that parts of different versions are never joined."""
        return self.folder / STATE_FOLDER / f"{self.path}.{self.tag}.partial"

    def is_complete(self) -> bool:
        return (
            self.tag_file.is_file()
            and self.tag_file.read_text("utf-8") == self.tag
            and self.target.is_file()
            and self.target.stat().st_size == self.size_bytes
        )

    def finish(self) -> None:
        """Move the partial file to its place, and remove partial copies of other versions."""
        self.tag_file.unlink(missing_ok=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.partial.replace(self.target)
        self.tag_file.write_text(self.tag, "utf-8")
        for stale in self.tag_file.parent.glob(f"{glob.escape(self.target.name)}.*.partial"):
            stale.unlink(missing_ok=True)


def download(
    client: "Client",
    rest_of: RestOf,
    files: Sequence[PulledFile],
    folder: Path,
    parallel: int,
    on_progress: OnProgress | None,
) -> None:
    """Write `files` into `folder`, `parallel` at a time.

    Complete files are kept, and partial downloads are resumed. Raises ValueError for a path that
    leads out of `folder`, and for a file whose size or tag differs from the listing; other files
    are left as they are then.
    """
    if parallel < 1:
        raise ValueError(f"parallel is {parallel}; download at least one file at a time")
    wanted = [_checked(one, folder) for one in files]
    progress = _Progress(sum(one.size_bytes for one in wanted), on_progress)
    threads = ThreadPoolExecutor(parallel)
    futures = [threads.submit(_fetch, client, rest_of, one, progress) for one in wanted]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # all done, one failed, or Ctrl-C: stop the remaining downloads
        progress.is_stopped = True
        threads.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def _checked(file: PulledFile, folder: Path) -> _File:
    path = PurePosixPath(file["path"])
    if path.is_absolute() or ".." in path.parts or not path.name or path.parts[0] == STATE_FOLDER:
        raise ValueError(f"the model has a file {file['path']!r}, which no folder can hold")
    return _File(str(path), file["size"], file["oid"], folder)


def _fetch(client: "Client", rest_of: RestOf, file: _File, progress: "_Progress") -> None:
    """Write one file, resuming it if the connection breaks."""
    if file.is_complete():
        progress.set(file.path, file.size_bytes)
        return
    file.partial.parent.mkdir(parents=True, exist_ok=True)
    for left in range(client.retries, -1, -1):
        try:
            _append(client, rest_of, file, progress)
            break
        except httpx.TransportError:
            if left == 0 or progress.is_stopped:
                raise
            time.sleep(_WAIT_SECONDS)
    got = file.partial.stat().st_size
    if progress.is_stopped and got < file.size_bytes:
        return
    if got != file.size_bytes:
        file.partial.unlink()
        raise ValueError(f"{file.path} has {got} bytes instead of {file.size_bytes}; pull it again")
    file.finish()


def _append(client: "Client", rest_of: RestOf, file: _File, progress: "_Progress") -> None:
    """Read what is missing of a partial file."""
    start = file.partial.stat().st_size if file.partial.is_file() else 0
    start = start if start < file.size_bytes else 0
    with client.stream(rest_of(file.path, start, file.tag)) as answer:
        if answer.headers.get("etag") != f'"{file.tag}"':
            raise ValueError(f"{file.path} changed during the download; pull it again")
        done = start if answer.status_code == httpx.codes.PARTIAL_CONTENT else 0
        with file.partial.open("ab" if done else "wb") as out:
            progress.set(file.path, done)
            for block in answer.iter_raw():  # as received: nothing is lost if the connection breaks
                if progress.is_stopped:
                    return
                out.write(block)
                done += len(block)
                progress.set(file.path, done)


class _Progress:
    """Adds up what the threads have; `is_stopped` ends them at their next block."""

    def __init__(self, total_bytes: int, report: OnProgress | None) -> None:
        self.is_stopped = False
        self._total_bytes = total_bytes
        self._report = report
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()

    def set(self, path: str, done_bytes: int) -> None:
        """Note how much of a file is there."""
        with self._lock:
            self._done[path] = done_bytes
            if self._report is not None:
                self._report(sum(self._done.values()), self._total_bytes)
