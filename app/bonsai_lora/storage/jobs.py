"""Records of jobs, one small piece of JSON each, which every worker and machine reads and changes.

A change reads the record, changes it and writes it only if nobody else has in between: in a folder
by a lock, in a bucket (`bucket_jobs`) by a conditional write. So a worker that cancels a job and
the one that runs it never overwrite what the other wrote. The result, which may be long, is apart.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from bonsai_lora.errors import BonsaiLoraError, JobInterruptedError
from bonsai_lora.storage.disk import storage_errors

State = Literal["queued", "running", "done", "failed", "cancelled"]

HEARTBEAT_SECONDS = 30.0
"""A job whose runner has written nothing for longer has failed: its process is gone."""
KEPT_SECONDS = 86_400.0
"""How long a finished job is kept."""

MOST_RECORDS = 1000
MOST_BYTES = 1 << 28
"""Finished jobs beyond these are forgotten earlier, the oldest first."""
_SHARE = 10
"""A key keeps its newest jobs, up to this part of the most, however many others have."""
_OWNER = slice(12, 16)
"""Where an id has the hash of a key's, which tells most keys apart."""
_ID = re.compile(r"[0-9a-f]{28}")
_LOCK = "lock"
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is stored; times in seconds since 1970."""

    id: str
    """Begins with the time of its creation, so that ids sort by age, and a hash of the key's id."""
    kind: str
    key: str
    """Id of the key that asked for it."""
    created_at: float
    heartbeat: float
    """When its runner last wrote."""
    state: State = "queued"
    started_at: float | None = None
    progress: float = 0.0
    """From 0 to 1."""
    is_cancelled: bool = False
    """Whether its runner should stop."""
    error: Mapping[str, Any] | None = None
    """Code, title, detail and values of an error."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("done", "failed", "cancelled")

    def is_lost(self, now: float) -> bool:
        """Return whether its runner must have died."""
        return not self.is_finished and now - self.heartbeat > HEARTBEAT_SECONDS


def new_record(kind: str, key: str) -> JobRecord:
    """Return the record of a new job."""
    now = time.time()
    owner = hashlib.sha256(key.encode()).hexdigest()[:4]
    return JobRecord(f"{int(now * 1000):012x}{owner}{secrets.token_hex(6)}", kind, key, now, now)


class JobRecords(Protocol):
    """The records of all jobs of a service. Thread-safe; methods raise errors of the store."""

    def read(self, number: str) -> JobRecord | None:
        """Return the record of a job; None if there is none, or it is of a newer release."""

    def add(self, record: JobRecord) -> None:
        """Write a new record, and forget those that are too old or too many."""

    def update(self, number: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord | None:
        """Replace a record by what `change` makes of it, and return that; None if it is gone.

        `change` may be called several times, and sees what others have written.
        """

    def write_result(self, number: str, result: Mapping[str, Any]) -> None:
        """Write the result of a job, before its record says that it is done."""

    def read_result(self, number: str) -> Mapping[str, Any] | None:
        """Return the result of a job that is done; None if there is none."""

    def ids(self) -> list[str]:
        """Return the ids of all jobs, the newest first."""


class JobFolder:
    """A folder with the records; a `JobRecords`. `root` is created with the first job."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, number: str) -> JobRecord | None:
        """Return the record of a job; None if there is none, or it is of a newer release."""
        if not is_job_id(number):
            return None
        try:
            content = self._path(number).read_bytes()
        except OSError:
            return None
        return decode(content)

    def add(self, record: JobRecord) -> None:
        """Write a new record, and forget those that are too old or too many."""
        with self._locked():
            self._write(record)
            self._forget_old()

    def update(self, number: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord | None:
        """Replace a record by what `change` makes of it, and return that; None if it is gone."""
        with self._locked():
            present = self.read(number)
            if present is None:
                return None
            changed = change(present)
            if changed != present:
                self._write(changed)
            return changed

    def write_result(self, number: str, result: Mapping[str, Any]) -> None:
        """Write the result of a job, before its record says that it is done."""
        self._replace(self._result_path(number), json.dumps(result))

    def read_result(self, number: str) -> Mapping[str, Any] | None:
        """Return the result of a job that is done; None if there is none."""
        try:
            found: Any = json.loads(self._result_path(number).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def ids(self) -> list[str]:
        """Return the ids of all jobs, the newest first."""
        if not self._root.is_dir():
            return []
        names = (entry.name.removesuffix(_SUFFIX) for entry in os.scandir(self._root))
        return sorted(filter(is_job_id, names), reverse=True)

    def _path(self, number: str) -> Path:
        return self._root / f"{number}{_SUFFIX}"

    def _result_path(self, number: str) -> Path:
        return self._root / f"{number}.result{_SUFFIX}"

    def _write(self, record: JobRecord) -> None:
        self._replace(self._path(record.id), encode(record).decode())

    def _replace(self, path: Path, text: str) -> None:
        temporary = path.with_suffix(".tmp")
        with storage_errors():
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)

    def _forget_old(self) -> None:
        known = []
        for number in self.ids():
            with contextlib.suppress(OSError):
                status = self._path(number).stat()
                result = self._result_path(number)
                size = status.st_size + (result.stat().st_size if result.exists() else 0)
                known.append((number, status.st_mtime, size))
        for number in forgettable(known, time.time()):
            self._path(number).unlink(missing_ok=True)
            self._result_path(number).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with storage_errors():
            self._root.mkdir(exist_ok=True)
            with (self._root / _LOCK).open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield


def is_job_id(number: str) -> bool:
    """Return whether a text has the form of a job's id."""
    return _ID.fullmatch(number) is not None


def forgettable(known: Sequence[tuple[str, float, int]], now: float) -> list[str]:
    """Return the ids of jobs to forget, of those given newest first.

    `known` are ids, times of the last write, and sizes in bytes. A job that runs is written each
    second, so one that is not has ended.
    """
    found, total = [], 0
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for place, (number, written_at, size) in enumerate(known):
        owner = number[_OWNER]
        total += size
        counts[owner] += 1
        sizes[owner] += size
        is_too_much = (place >= MOST_RECORDS or total > MOST_BYTES) and (
            counts[owner] > MOST_RECORDS // _SHARE or sizes[owner] > MOST_BYTES // _SHARE
        )
        idle = now - written_at
        if idle > KEPT_SECONDS or (is_too_much and idle > HEARTBEAT_SECONDS):
            found.append(number)
    return found


def as_seen(record: JobRecord, now: float) -> JobRecord:
    """Return a record as callers see it: a job whose runner has died is a failed one."""
    return failed(record, JobInterruptedError()) if record.is_lost(now) else record


def failed(record: JobRecord, error: BonsaiLoraError) -> JobRecord:
    """Return the record of a job that ended with an error."""
    problem = {"code": error.code, "title": error.title, "detail": error.detail, **error.values}
    return replace(record, state="failed", error=problem)


def encode(record: JobRecord) -> bytes:
    """Return a record as JSON, which is different each time, as `Bucket.put` needs it."""
    return json.dumps(asdict(record) | {"nonce": secrets.token_hex(8)}).encode()


def decode(content: bytes) -> JobRecord | None:
    """Return the record that `encode` wrote; None for anything else."""
    try:
        found = json.loads(content)
        return JobRecord(**{field.name: found[field.name] for field in fields(JobRecord)})
    except (ValueError, KeyError, TypeError):
        return None
