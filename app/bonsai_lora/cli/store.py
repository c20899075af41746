"""Commands over the folder of a store, which a running service may use: backup, restore and gc."""

import argparse
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from bonsai_lora.cli.client import EXIT_REFUSED, EXIT_USAGE
from bonsai_lora.cli.progress import ProgressLine
from bonsai_lora.settings import Settings
from bonsai_lora.storage.backup import back_up, restore
from bonsai_lora.storage.leftovers import bad_files, old_folders, remove_leftovers
from bonsai_lora.storage.store import SetStore

_BAD_DAYS = 30.0


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the folder."""
    parser.add_argument("--store", type=Path, help="the folder (default: the setting `store`)")


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
        "Remove what nobody needs from a store: temporary files of processes that died, and, "
        "after a question, files that could not be read and were moved to the folder `bad`."
    )
    parser.add_argument(
        "--days", type=float, default=_BAD_DAYS, help="keep bad files so long (%(default)g)"
    )
    parser.add_argument("--yes", action="store_true", help="remove bad files without a question")
    add_store(parser)
    parser.set_defaults(run=run_gc)


def run_backup(arguments: argparse.Namespace) -> int:
    """Write a backup; return the exit code."""
    root = folder_of(arguments)
    if not (root / "sets").is_dir():
        return not_a_store(root)
    try:
        with ProgressLine() as progress:
            entries = back_up(SetStore(root), arguments.folder, progress.update)
    except OSError as error:
        return _failed(f"no backup was made: {error}")
    size = sum(one["bytes"] for one in entries)
    print(f"{len(entries):,} sets, {size:,} bytes: {arguments.folder}")
    return 0


def run_restore(arguments: argparse.Namespace) -> int:
    """Restore a backup; print each set that could not be, and return the exit code."""
    wrong = count = 0
    try:
        with ProgressLine() as progress:
            store = SetStore(folder_of(arguments))
            for name, problem in restore(store, arguments.folder, progress.update):
                count += 1
                if problem is not None:
                    wrong += 1
                    print(f"{name}: {problem}", file=sys.stderr)
    except (OSError, ValueError) as error:
        return _failed(str(error))
    print(f"{count - wrong:,} of {count:,} sets are in {store.root}")
    return EXIT_REFUSED if wrong else 0


def run_gc(arguments: argparse.Namespace) -> int:
    """Remove leftovers and old bad files; return the exit code."""
    root = folder_of(arguments)
    if not (root / "sets").is_dir():
        return not_a_store(root)
    removed = remove_leftovers(root / "tmp")
    for folder in old_folders(root / "tmp"):
        shutil.rmtree(folder)
        removed += 1
    print(f"{removed:,} temporary files removed")
    bad = bad_files(root / "bad", arguments.days)
    if not bad:
        return 0
    for path in bad:
        status = path.lstat()
        moved = time.strftime("%Y-%m-%d", time.gmtime(status.st_ctime))
        print(f"{moved}  {status.st_size:>14,} B  {path.name}")
    if arguments.yes or _agreed(f"Remove these {len(bad):,} files for good? [y/N] "):
        for path in bad:
            path.unlink(missing_ok=True)
        print(f"{len(bad):,} bad files removed")
    else:
        print("no bad file removed; --yes removes them without a question")
    return 0


def check_bucket(url: str) -> None:
    """Raise ValueError if `url` does not name a bucket, or what connects to it is missing."""
    if not urlsplit(url).netloc:
        raise ValueError(f"the store {url!r} names no bucket; expected such as s3://bucket/prefix")
    if find_spec("obstore") is None:
        raise ValueError(
            f"the store {url} needs obstore, which is not installed; pip install 'bonsai-lora[s3]'"
        )


def folder_of(arguments: argparse.Namespace) -> Path:
    """Return the folder of the store that the arguments or the settings name."""
    return arguments.store or Path(Settings().store)


def not_a_store(folder: Path) -> int:
    """Print that there is no store at `folder`, and return the exit code."""
    return _failed(f"{folder} is not a store; name one with --store")


def _failed(text: str) -> int:
    print(f"bonsai-lora: {text}", file=sys.stderr)
    return EXIT_USAGE


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(question).strip().lower() in ("y", "yes")
