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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bonsai_lora.errors import BonsaiLoraError, NewerFormatError
from bonsai_lora.storage.disk import synced
from bonsai_lora.storage.listing import SUFFIX
from bonsai_lora.storage.setfile import read_record
from bonsai_lora.storage.store import SetStore

LISTING = "listing.json"
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


def restore(store: SetStore, source: Path, on_bytes: OnSet) -> Iterator[tuple[str, str | None]]:
    """Add the sets of a backup to `store`, durably; give the name of each, and what is wrong.

    A set that is there already in the same version is left. Raises OSError, and ValueError if
    `source` is not a backup.
    """
    entries = _read_listing(source / LISTING)
    total, done = sum(one["bytes"] for one in entries), 0
    for one in entries:
        path = source / "sets" / f"{one['name']}{SUFFIX}"
        try:
            if path.stat().st_size != one["bytes"]:
                yield one["name"], f"{path} is not of {one['bytes']} bytes"
                continue
            store.add_file(path)
            yield one["name"], None
        except FileNotFoundError:
            yield one["name"], f"{path} is missing"
        except BonsaiLoraError as error:
            yield one["name"], error.detail
        done += one["bytes"]
        on_bytes(done, total)


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


def _read_listing(path: Path) -> list[dict[str, Any]]:
    try:
        listing = json.loads(path.read_bytes())
        if listing["format"] != 1:
            raise ValueError(f"format {listing['format']}, not 1")
        return [{"name": str(one["name"]), "bytes": int(one["bytes"])} for one in listing["sets"]]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is not the listing of a backup: {error!r}") from None
