"""Commands over a store, which a running service may use: backup, restore and gc."""

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bonsai_lora.cli.output import EXIT_REFUSED, failed, plain
from bonsai_lora.cli.progress import ProgressLine
from bonsai_lora.errors import counted
from bonsai_lora.settings import SettingsError, is_bucket, read_settings
from bonsai_lora.storage.backup import back_up, read_listing, restore
from bonsai_lora.storage.leftovers import bad_files, old_folders, remove_leftovers
from bonsai_lora.storage.protocol import Store
from bonsai_lora.storage.staging import FOLDER, expire_folder
from bonsai_lora.storage.store import SetStore

_BAD_DAYS = 30.0
_GRACE_HOURS = 24.0
_CACHE_BYTES = 16 << 30


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the store."""
    parser.add_argument(
        "--store",
        help="folder or bucket of the sets (default: BONSAI_LORA_STORE, or ./bonsai-lora-data)",
    )


def add_backup(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `backup`."""
    parser.description = (
        "Write all sets as of one moment to a new folder. On the file system of the store these "
        "are hard links, which take no space until a set is changed; elsewhere they are copies."
    )
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    add_store(parser)
    parser.set_defaults(run=run_backup)


def add_restore(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `restore`."""
    parser.description = (
        "Add the sets of a backup to a store, which is made if it does not exist. Each file is "
        "verified first. No set is replaced, and one that is there already is left, so that a "
        "restore can be continued. The exit code is 1 if a set could not be restored."
    )
    parser.add_argument("folder", type=Path, help="a folder that `bonsai-lora backup` wrote")
    add_store(parser)
    parser.set_defaults(run=run_restore)


def add_gc(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gc`."""
    parser.description = (
        "Remove what nobody needs from a store. From a folder: temporary files of processes that "
        "died, uploads that no commit named within a day, and, after asking, files that could not "
        "be read and were moved to the folder `bad`. From a bucket: such uploads, and blobs that "
        "no set needs and what is left of deleted sets, both once they are older than the grace; "
        "it also counts the sums again, and writes the index."
    )
    parser.add_argument(
        "--days",
        type=float,
        default=_BAD_DAYS,
        help="remove bad files older than this (default: %(default)g)",
    )
    parser.add_argument(
        "--grace-hours",
        type=float,
        default=_GRACE_HOURS,
        help="remove what a bucket does not need once it is older than this (default: %(default)g)",
    )
    parser.add_argument("--yes", action="store_true", help="remove bad files without asking")
    add_store(parser)
    parser.set_defaults(run=run_gc)


def run_backup(arguments: argparse.Namespace) -> int:
    """Write a backup; return the exit code."""
    if is_bucket(store_of(arguments)):
        return failed(
            "a bucket is not backed up to a folder; use the versions or the replication of the "
            "bucket, or copy its prefix"
        )
    root = Path(store_of(arguments))
    if not (root / "sets").is_dir():
        return not_a_store(root)
    try:
        with ProgressLine() as progress:
            entries = back_up(SetStore(root), arguments.folder, progress.update)
    except FileExistsError as error:
        return failed(f"{error.filename} exists already; name a new folder")
    except OSError as error:
        return failed(f"no backup was made: {plain(error)}")
    size = sum(one["bytes"] for one in entries)
    print(f"{counted(len(entries), 'set')}, {counted(size, 'byte')}: {arguments.folder}")
    return 0


def run_restore(arguments: argparse.Namespace) -> int:
    """Restore a backup; print each set that could not be, and return the exit code."""
    place, wrong, count = store_of(arguments), 0, 0
    try:
        listing = read_listing(arguments.folder)
        with ProgressLine() as progress, _opened(place) as store:
            for name, problem in restore(store, arguments.folder, listing, progress.update):
                count += 1
                if problem is not None:
                    wrong += 1
                    print(f"{name}: {problem}", file=sys.stderr)
    except (OSError, ValueError) as error:
        return failed(plain(error))
    print(f"{count - wrong:,} of {count:,} sets are in {place}")
    return EXIT_REFUSED if wrong else 0


def run_gc(arguments: argparse.Namespace) -> int:
    """Remove leftovers and old bad files; return the exit code."""
    if is_bucket(store_of(arguments)):
        from bonsai_lora.cli.bucket import collect_bucket  # noqa: PLC0415 - optional

        return collect_bucket(store_of(arguments), arguments.grace_hours)
    root = Path(store_of(arguments))
    if not (root / "sets").is_dir():
        return not_a_store(root)
    removed = remove_leftovers(root / "tmp")
    for folder in old_folders(root / "tmp"):
        shutil.rmtree(folder)
        removed += 1
    print(f"{counted(removed, 'temporary file')} removed")
    print(f"{counted(expire_folder(root / FOLDER), 'upload')} without a commit removed")
    bad = bad_files(root / "bad", arguments.days)
    if not bad:
        return 0
    for path in bad:
        status = path.lstat()
        moved = time.strftime("%Y-%m-%d", time.gmtime(status.st_ctime))
        print(f"{moved}  {status.st_size:>14,} B  {path.name}")
    if arguments.yes or _agreed(f"Remove {counted(len(bad), 'file')} for good? [y/N] "):
        for path in bad:
            path.unlink(missing_ok=True)
        print(f"{counted(len(bad), 'bad file')} removed")
    else:
        print("no bad file removed; --yes removes them without asking")
    return 0


def store_of(arguments: argparse.Namespace) -> str:
    """Return the store that the arguments or the settings name: a folder, or a bucket's URL.

    Prints what is wrong with the settings and exits if they are invalid.
    """
    given = {"store": arguments.store} if arguments.store else {}
    try:
        return read_settings(**given).store
    except SettingsError as error:
        sys.exit(failed(str(error)))


@contextlib.contextmanager
def _opened(place: str) -> Iterator[Store]:
    """Open the store at a place; that of a bucket has a temporary cache."""
    if not is_bucket(place):
        yield SetStore(Path(place))
        return
    from bonsai_lora.storage.bucket_store import open_bucket_store  # noqa: PLC0415 - optional

    with tempfile.TemporaryDirectory(prefix="bonsai-lora-") as cache:
        store = open_bucket_store(
            place,
            Path(cache) / "cache",
            cache_bytes=_CACHE_BYTES,
            stale_seconds=0,
            stale_if_error_seconds=0,
        )
        yield store
        store.close()


def not_a_store(folder: Path) -> int:
    """Print that there is no store at `folder`, and return the exit code."""
    return failed(f"there is no store at {folder}; name one with --store")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(question).strip().lower() in ("y", "yes")
