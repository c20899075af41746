"""The folder of a running service, which is removed when it ends, or when the next one starts."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "bonsai-lora-"
_LOCK = "service.lock"
_YOUNG_SECONDS = 60


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Create a folder that is removed on exit; remove those of services that were killed.

    A lock is held on a file in it, by the workers too, which inherit the open file.
    """
    _remove_leftovers(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name)
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def _remove_leftovers(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), path.open() as lock:
            status = os.fstat(lock.fileno())
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _YOUNG_SECONDS:
                continue  # a young one may not be locked yet
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)
