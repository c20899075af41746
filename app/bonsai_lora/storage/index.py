"""A table of the sets of a store, in SQLite: pages by name, and sums, kept with each change.

The table is derived: `storage/listing.py` makes it from the files, again if it is lost.
"""

import json
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from operator import add, sub
from pathlib import Path

from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.storage.dropped import Dropped
from bonsai_lora.storage.setfile import SetRecord, record_from_text, record_to_text

_BUSY_SECONDS = 10
_UNREADABLE = (BonsaiLoraError, LookupError, ValueError, TypeError, AttributeError)
_END = "\U0010ffff"
"""Sorts after whatever may follow a prefix."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sets(
    name TEXT PRIMARY KEY, stamp TEXT NOT NULL, newer INTEGER NOT NULL, base TEXT NOT NULL,
    adapters INTEGER NOT NULL, params INTEGER NOT NULL, held INTEGER NOT NULL, record TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_base ON sets(base, name) WHERE NOT newer;
CREATE INDEX IF NOT EXISTS by_size ON sets(held DESC, name) WHERE NOT newer;
CREATE INDEX IF NOT EXISTS of_newer ON sets(name, held) WHERE newer;
CREATE TABLE IF NOT EXISTS sums(
    prefix TEXT PRIMARY KEY, sets INTEGER NOT NULL, adapters INTEGER NOT NULL,
    params INTEGER NOT NULL, held INTEGER NOT NULL, newer INTEGER NOT NULL,
    newer_held INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state(
    one INTEGER PRIMARY KEY CHECK(one = 1), folder INTEGER NOT NULL, compared REAL NOT NULL
);
INSERT OR IGNORE INTO state VALUES(1, -1, 0);
CREATE TABLE IF NOT EXISTS dropped(
    one INTEGER PRIMARY KEY CHECK(one = 1), number INTEGER NOT NULL, names TEXT NOT NULL
);
INSERT OR IGNORE INTO dropped VALUES(1, 0, '[]');
"""
_SUM = """
SELECT coalesce(sum(NOT newer), 0), coalesce(sum(adapters), 0), coalesce(sum(params), 0),
    coalesce(sum(held * (NOT newer)), 0), coalesce(sum(newer), 0),
    coalesce(sum(held * newer), 0)
FROM sets WHERE name >= ? AND name < ?
"""
_PAGE = """
SELECT name, record FROM sets
WHERE NOT newer AND name > ? AND name >= ? AND name < ? ORDER BY name LIMIT ?
"""
_PAGE_OF_BASE = _PAGE.replace("NOT newer", "NOT newer AND base = ?")
_LARGEST = """
SELECT name, record FROM sets INDEXED BY by_size
WHERE NOT newer AND name >= ? AND name < ? ORDER BY held DESC, name LIMIT ?
"""
_LARGEST_OF_FEW = _LARGEST.replace("INDEXED BY by_size", "").replace("BY held", "BY +held")
_ADD = """
UPDATE sums SET sets = sets + ?, adapters = adapters + ?, params = params + ?, held = held + ?,
    newer = newer + ?, newer_held = newer_held + ?
WHERE prefix IN (SELECT value FROM json_each(?))
"""


class DamagedIndexError(sqlite3.DatabaseError):
    """A row is not one that was written."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the sets whose names have some starts."""

    sets: int = 0
    adapters: int = 0
    params: int = 0
    held_bytes: int = 0
    """Size of all sets as float32."""
    newer: int = 0
    """Files that a newer release wrote; they are not counted as sets."""
    newer_bytes: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(*map(sub, astuple(self), astuple(other)))


def sums_of(one: SetRecord) -> Sums:
    """Return what one set adds to the sums."""
    return Sums(1, one.adapter_count, one.total_trainable_params, one.total_memory_bytes)


@dataclass(frozen=True, slots=True)
class Row:
    """What the table has of the file of one set."""

    name: str
    stamp: str
    """Changes when the file does."""
    record: SetRecord | None
    """None for a file that a newer release wrote."""
    file_bytes: int

    def sums(self) -> Sums:
        """Return what this file adds to the sums."""
        if self.record is None:
            return Sums(newer=1, newer_bytes=self.file_bytes)
        return sums_of(self.record)


class SetIndex:
    """The table at `path`, or in memory. Thread-safe: one connection, used by one thread at a time.

    One in memory that `may_spill` uses a temporary file when it is large.

    All methods raise sqlite3.Error if the file is damaged, cannot be written or stays locked.
    """

    def __init__(self, path: Path | None, *, may_spill: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(
            path or ("" if may_spill else ":memory:"),
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        self.close = weakref.finalize(self, self._connection.close)
        if path is not None:
            mode = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise sqlite3.OperationalError(f"the journal mode is {mode}, not wal")
            # A crash of the machine may lose the last commits, which are compared at the start.
            self._connection.execute("PRAGMA synchronous = NORMAL")
        with self.transaction():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._connection.execute(statement)
        self.sums("")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make changes at once or, after an exception, not at all; one process at a time."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def folder_time(self) -> int:
        """Return the time of change of the folder with which the table agrees; -1 at first."""
        return int(self._ask("SELECT folder FROM state")[0][0])

    def set_folder_time(self, nanoseconds: int) -> None:
        """Note that the table agrees with the folder as changed then."""
        self._ask("UPDATE state SET folder = ?", nanoseconds)

    def compared_at(self) -> float:
        """Return when a process last began to compare the table with all files (Unix time)."""
        return abs(self._compared())

    def is_whole(self) -> bool:
        """Return whether the last comparison with all files ended, or was not needed."""
        return self._compared() >= 0

    def begin_comparison(self, seconds: float, *, is_needed: bool) -> None:
        """Note that a process begins to compare the table with all files, at this Unix time."""
        self._ask("UPDATE state SET compared = ?", -seconds if is_needed else seconds)

    def end_comparison(self, seconds: float) -> None:
        """Note that the comparison that began then has ended, unless a later one has begun."""
        self._ask("UPDATE state SET compared = ? WHERE compared = ?", seconds, -seconds)

    def _compared(self) -> float:
        return float(self._ask("SELECT compared FROM state")[0][0])

    def dropped(self) -> Dropped:
        """Return what was beside the files of sets when they were last compared."""
        number, names = self._ask("SELECT number, names FROM dropped")[0]
        try:
            return Dropped(number, json.loads(names))
        except ValueError as error:
            raise DamagedIndexError(f"the names of dropped files are unreadable: {error}") from None

    def set_dropped(self, dropped: Dropped) -> None:
        """Note what is beside the files of sets. Call in a transaction."""
        names = json.dumps(dropped.names)
        self._ask("UPDATE dropped SET number = ?, names = ?", dropped.count, names)

    def stamps(self) -> dict[str, str]:
        """Return the stamp of each file by the set's name."""
        return dict(self._ask("SELECT name, stamp FROM sets"))

    def put(self, row: Row) -> None:
        """Insert or replace a row. Call in a transaction."""
        self.remove(row.name)
        self._ask("INSERT INTO sets VALUES(?, ?, ?, ?, ?, ?, ?, ?)", *_columns(row))
        self._add(row.name, astuple(row.sums()))

    def fill(self, rows: Iterable[Row]) -> None:
        """Insert rows of a new table; its sums are counted when needed. Call in a transaction."""
        self._ask("DELETE FROM sums")
        self._connection.executemany(
            "INSERT OR REPLACE INTO sets VALUES(?, ?, ?, ?, ?, ?, ?, ?)", map(_columns, rows)
        )

    def remove(self, name: str) -> None:
        """Remove the row of a set, if there is one. Call in a transaction."""
        gone = self._ask(_SUM, name, f"{name}\0")[0]
        if any(gone):
            self._ask("DELETE FROM sets WHERE name = ?", name)
            self._add(name, [-one for one in gone])

    def sums(self, *starts: str) -> Sums:
        """Return the sums over names that begin with one of `starts`.

        No start may begin with a different one. The first call for a start counts its sets, and
        changes keep its sums from then on.
        """
        return sum((self._kept_sums(one) or self._new_sums(one) for one in starts), Sums())

    def sums_of(self, name: str) -> Sums:
        """Return what one file adds to the sums."""
        return Sums(*self._ask(_SUM, name, f"{name}\0")[0])

    def page(
        self, starts: Iterable[str], *, after: str, base: str | None, limit: int
    ) -> list[SetRecord]:
        """Return up to `limit` records after the name `after`, sorted by name."""
        found: list[SetRecord] = []
        for start in sorted(starts):
            query, known = (_PAGE, ()) if base is None else (_PAGE_OF_BASE, (base,))
            bounds = after, start, f"{start}{_END}", limit - len(found)
            found += map(_record_of, self._ask(query, *known, *bounds))
        return found

    def largest(self, starts: Iterable[str], limit: int) -> list[SetRecord]:
        """Return up to `limit` records, the largest sets first."""
        found: list[SetRecord] = []
        for start in starts:
            # Either all rows of this start are sorted, or all sets are passed by size until `limit`
            # are of it, which are about `total * limit / some`.
            some, total = self.sums(start).sets, self.sums("").sets
            query = _LARGEST if some * some > total * limit else _LARGEST_OF_FEW
            found += map(_record_of, self._ask(query, start, f"{start}{_END}", limit))
        return sorted(found, key=lambda one: (-one.total_memory_bytes, one.name))[:limit]

    def newer_files(self) -> dict[str, int]:
        """Return the sizes in bytes, by set name, of files that a newer release wrote."""
        return dict(self._ask("SELECT name, held FROM sets WHERE newer ORDER BY name"))

    def _ask(self, query: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def _kept_sums(self, start: str) -> Sums | None:
        found = self._ask(
            "SELECT sets, adapters, params, held, newer, newer_held FROM sums WHERE prefix = ?",
            start,
        )
        return Sums(*found[0]) if found else None

    def _new_sums(self, start: str) -> Sums:
        with self.transaction():
            counted = self._ask(_SUM, start, f"{start}{_END}")[0]
            self._ask("INSERT OR REPLACE INTO sums VALUES(?, ?, ?, ?, ?, ?, ?)", start, *counted)
        return Sums(*counted)

    def _add(self, name: str, change: Sequence[int]) -> None:
        """Add to the sums of every start of `name` that has sums."""
        starts = [name[:length] for length in range(len(name) + 1)]
        self._ask(_ADD, *change, json.dumps(starts))


def _columns(row: Row) -> tuple[object, ...]:
    one, sums = row.record, row.sums()
    text = "" if one is None else record_to_text(one)
    base = "" if one is None else one.base_model_name
    held = row.file_bytes if one is None else sums.held_bytes
    return row.name, row.stamp, one is None, base, sums.adapters, sums.params, held, text


def _record_of(row: tuple[str, str]) -> SetRecord:
    try:
        return record_from_text(*row)
    except _UNREADABLE as error:
        raise DamagedIndexError(f"the row of {row[0]!r} is unreadable: {error!r}") from None
