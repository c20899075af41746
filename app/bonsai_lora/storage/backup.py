"""Back up a store while it is in use, and restore it.

A backup is a folder with `sets`, a file per set as in the store, and `listing.json`, what each of
them is. It is of one moment: all files are linked while nothing can be changed, which takes
seconds for a hundred thousand. They never change, so they may be copied afterwards.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bonsai_lora.errors import (
    BonsaiLoraError,
    ChangedMeanwhileError,
    NewerFormatError,
    SetExistsError,
    SetNotFoundError,
)
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.storage.disk import synced
from bonsai_lora.storage.files import SUFFIX
from bonsai_lora.storage.protocol import Store
from bonsai_lora.storage.setfile import read_record
from bonsai_lora.storage.store import SetStore
from bonsai_lora.storage.verify import verify_set_file

LISTING = "listing.json"
Listing = list[tuple[str, int]]
"""The name and the length in bytes of each file of a backup."""
OnSet = Callable[[int, int], None]
"""Called with the bytes done and those of the whole."""


def back_up(store: SetStore, target: Path, on_bytes: OnSet) -> list[dict[str, Any]]:
    """Write a backup to the new folder `target`, durably, and return its listing.

    Its files are hard links if `target` is on the file system of the store, else copies. Raises
    FileExistsError if `target` exists, and OSError.
    """
    target.mkdir(parents=True)
    with _linked(store) as staged:
        entries = [_entry(path) for path in sorted(staged.iterdir())]
        _move(staged, target / "sets", sum(one["bytes"] for one in entries), on_bytes)
    text = json.dumps({"format": 1, "sets": entries}, indent=1)
    with synced(target), (target / LISTING).open("w", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(target.parent)
    return entries


def restore(
    store: Store, source: Path, entries: Listing, on_bytes: OnSet
) -> Iterator[tuple[str, str | None]]:
    """Add the sets of a backup to `store`, durably; give the name of each, and what is wrong.

    `entries` is what `read_listing` returned of it. A set that is there already in the same version
    is left. Raises OSError.
    """
    total, done = sum(size for _, size in entries), 0
    for name, size in entries:
        yield name, _problem_of(store, source / "sets" / f"{name}{SUFFIX}", size)
        done += size
        on_bytes(done, total)


def _problem_of(store: Store, path: Path, size: int) -> str | None:
    """Add the set of one file; return what is wrong with it."""
    try:
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, but was written with {size}"
        _add(store, path)
    except FileNotFoundError:
        return f"{path} is missing"
    except ChangedMeanwhileError:
        return "it was changed at the same moment; restore it again"
    except BonsaiLoraError as error:
        return error.detail
    return None


def _add(store: Store, path: Path) -> None:
    """Add a set from a copy of its file, unless this version of it is there already.

    Raises SetExistsError if a different one is, and the errors of `verify_set_file`, and then
    changes nothing.
    """
    record = verify_set_file(path)
    with store.lock(record.name):
        with suppress(SetNotFoundError):
            if store.read_record(record.name) == record:
                return
            raise SetExistsError(
                f"a different set named {record.name!r} exists; delete it, or restore into an "
                "empty store",
                set=record.name,
            )
        with store.new_file() as file, path.open("rb") as source:
            shutil.copyfileobj(source, file)
            store.add(file, record.name)


@contextmanager
def _linked(store: SetStore) -> Iterator[Path]:
    """Link the files of all sets, as of one moment, into a folder on the store's file system."""
    staged = store.temporary / f"backup-{secrets.token_hex(8)}"
    staged.mkdir()
    try:
        with store.lock_all():
            for name in store.list_names():
                path = store.root / "sets" / f"{name}{SUFFIX}"
                if path.is_file():
                    os.link(path, staged / path.name)
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _entry(path: Path) -> dict[str, Any]:
    """Return what the listing has of a file; no more than its size if it cannot be read."""
    entry: dict[str, Any] = {"name": path.stem, "bytes": path.stat().st_size}
    try:
        record = read_record(path)
    except NewerFormatError:
        return entry
    return {**entry, "etag": record.etag, "sha256": record.digest}


def _move(staged: Path, target: Path, total: int, on_bytes: OnSet) -> None:
    """Rename the folder of links to `target`, or copy its files there, durably."""
    try:
        staged.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        target.mkdir()
        done = 0
        for path in sorted(staged.iterdir()):
            with path.open("rb") as source, (target / path.name).open("xb") as file:
                shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
                done += file.tell()
            on_bytes(done, total)
    _sync_folder(target)


def _sync_folder(folder: Path) -> None:
    with synced(folder):
        pass


def read_listing(folder: Path) -> Listing:
    """Return what a backup has; raises OSError, and ValueError if the folder is not a backup."""
    path = folder / LISTING
    if not path.exists():
        fault = f"is not a backup, as it has no {LISTING}" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {fault}; name a folder that `backup` wrote")
    try:
        listing = json.loads(path.read_bytes())
        found = [(str(one["name"]), int(one["bytes"])) for one in listing["sets"]]
        if listing["format"] == 1 and all(is_set_name(name) for name, _ in found):
            return found
    except (ValueError, TypeError, LookupError):
        pass
    raise ValueError(f"{path} is not the listing of a backup; name a folder that `backup` wrote")
