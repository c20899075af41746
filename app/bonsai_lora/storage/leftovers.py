"""Files of a store that nobody needs any more: temporary files of dead processes, and bad files."""

import contextlib
import fcntl
import time
from pathlib import Path

_LEFTOVER_SECONDS = 60
_BACKUP_SECONDS = 86400


def remove_leftovers(folder: Path) -> int:
    """Remove unlocked temporary files, and return how many; a new, empty one may be in use."""
    removed = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = path.stat()
            if status.st_size or time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                path.unlink()
                removed += 1
    return removed


def old_folders(folder: Path) -> list[Path]:
    """Return folders of backups that were begun more than a day ago, and did not finish."""
    before = time.time() - _BACKUP_SECONDS
    return [one for one in folder.glob("backup-*") if one.is_dir() and one.stat().st_mtime < before]


def bad_files(folder: Path, days: float) -> list[Path]:
    """Return the files in the folder `bad` that were moved there more than `days` days ago."""
    before = time.time() - days * 86400
    present = sorted(folder.glob("*")) if folder.is_dir() else []
    # A rename changes the time of the inode's change, and keeps that of its content's.
    return [path for path in present if path.lstat().st_ctime < before]
