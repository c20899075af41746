"""The JSON of jobs as pydantic models; their docstrings appear in OpenAPI."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from bonsai_lora.storage.jobs import JobRecord, State

JobKind = Literal["combine", "compare", "extract", "spectrum", "survival"]

_RESULTS = (
    *("CombinedSet", "CombineReport", "ComparisonInfo", "ExtractedSet", "SetSpectrum"),
    "SurvivalInfo",
)
"""Names of the schemas of results."""


def _list_results(schema: dict[str, Any]) -> None:
    results = [{"$ref": f"#/components/schemas/{name}"} for name in _RESULTS]
    schema["anyOf"] = [*results, {"type": "null"}]


class Job(BaseModel):
    """Work that goes on after the answer to its request."""

    id: str
    kind: str = Field(
        description="combine, compare, extract, spectrum or survival; later releases add kinds"
    )
    state: State
    created_at: str
    progress: float = Field(description="from 0 to 1")
    eta_seconds: float | None = Field(
        description="seconds that are left at the speed so far; null unless it runs"
    )
    result: dict[str, Any] | None = Field(
        description="of a job that is done: what its request would have answered",
        json_schema_extra=_list_results,
    )
    error: dict[str, Any] | None = Field(
        description="of a job that failed: `code`, `title`, `detail` and values of a problem"
    )

    @classmethod
    def of(cls, record: JobRecord, result: Mapping[str, Any] | None = None) -> "Job":
        """Return the schema of a record, with its result if that is shown."""
        created = datetime.fromtimestamp(record.created_at, UTC)
        return cls(
            id=record.id,
            kind=record.kind,
            state=record.state,
            created_at=created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            progress=record.progress,
            eta_seconds=_seconds_left(record),
            result=None if result is None else dict(result),
            error=None if record.error is None else dict(record.error),
        )


def _seconds_left(record: JobRecord) -> float | None:
    if record.state != "running" or record.started_at is None or record.progress <= 0:
        return None
    elapsed = time.time() - record.started_at
    return round(elapsed * (1 - record.progress) / record.progress, 1)


class JobPage(BaseModel):
    """Jobs, the newest first, without their results."""

    jobs: list[Job]
    next_cursor: str | None = Field(
        description="pass it as `cursor` to get the next page; null on the last page"
    )
