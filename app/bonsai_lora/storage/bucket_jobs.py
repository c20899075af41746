"""Records of jobs in a bucket, for all machines."""

import json
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from bonsai_lora.storage.bucket import Bucket, ConflictError
from bonsai_lora.storage.jobs import JobRecord, decode, encode, forgettable, is_job_id

_RECORDS, _RESULTS = "jobs", "job-results"


class BucketJobs:
    """The records below `jobs/` of a bucket; a `JobRecords`.

    A job that runs costs two requests a second. The clocks of the machines have to agree to within
    a few seconds, as heartbeats are compared with them.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def read(self, number: str) -> JobRecord | None:
        """Return the record of a job; None if there is none, or it is of a newer release."""
        found = self._bucket.get(f"{_RECORDS}/{number}") if is_job_id(number) else None
        return None if found is None else decode(found.body)

    def add(self, record: JobRecord) -> None:
        """Write a new record, and forget those that are too old or too many."""
        self._bucket.put(f"{_RECORDS}/{record.id}", encode(record), replaces=None)
        sizes = {one.name: one.size for one in self._bucket.list_all(_RESULTS)}
        known = sorted(
            (
                (one.name, one.modified.timestamp(), sizes.get(one.name, 0))
                for one in self._bucket.list_all(_RECORDS)
            ),
            reverse=True,
        )
        for number in forgettable(known, time.time()):
            self._bucket.delete(f"{_RECORDS}/{number}")
            self._bucket.delete(f"{_RESULTS}/{number}")

    def update(self, number: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord | None:
        """Replace a record by what `change` makes of it, and return that; None if it is gone."""
        key = f"{_RECORDS}/{number}"
        while (found := self._bucket.get(key)) is not None:
            present = decode(found.body)
            if present is None:
                return None
            changed = change(present)
            if changed == present:
                return changed
            try:
                self._bucket.put(key, encode(changed), replaces=found.etag)
            except ConflictError:
                continue  # somebody else was faster
            return changed
        return None

    def write_result(self, number: str, result: Mapping[str, Any]) -> None:
        """Write the result of a job, before its record says that it is done."""
        body = zlib.compress(json.dumps(result).encode())
        self._bucket.put(f"{_RESULTS}/{number}", body, replaces=None)

    def read_result(self, number: str) -> Mapping[str, Any] | None:
        """Return the result of a job that is done; None if there is none, or more than 4 MiB."""
        found = self._bucket.get(f"{_RESULTS}/{number}")
        try:
            result: Any = None if found is None else json.loads(zlib.decompress(found.body))
        except (zlib.error, ValueError):
            return None
        return result if isinstance(result, dict) else None

    def ids(self) -> list[str]:
        """Return the ids of all jobs, the newest first."""
        names = (one.name for one in self._bucket.list_all(_RECORDS))
        return sorted(filter(is_job_id, names), reverse=True)
