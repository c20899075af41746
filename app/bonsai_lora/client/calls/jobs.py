"""Jobs: look at them, and cancel them."""

from collections.abc import Mapping
from typing import Any

from bonsai_lora.client.call import Call, path_of, query_of
from bonsai_lora.client.lab_answers import Job, JobPage
from bonsai_lora.client.refusals import error_of
from bonsai_lora.errors import JobInterruptedError


def list_jobs(*, limit: int | None = None, cursor: str | None = None) -> Call[JobPage]:
    """Return a page of the caller's jobs of the last day, the newest first, without results."""
    query = query_of(limit=limit, cursor=cursor)
    return Call(path="/v1/jobs", query=query)


def get_job(number: str) -> Call[Job]:
    """Return a job, with its result if it is done; raises JobNotFoundError."""
    return Call(path=path_of("v1", "jobs", number))


def cancel_job(number: str) -> Call[Job]:
    """Ask a job to stop, and return it; one that runs stops within seconds."""
    return Call(method="DELETE", path=path_of("v1", "jobs", number))


WAIT_SECONDS = (0.05, 1.0)
"""The first wait for a job, and the longest."""


def result_of(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result of a job, None if it has not ended; raises the error of one that failed.

    A result that came without a job is returned as it is.
    """
    if "state" not in job:
        return dict(job)
    if job["state"] == "failed":
        raise error_of(job["error"] or {})
    if job["state"] == "cancelled":
        raise JobInterruptedError(f"job {job['id']} was cancelled")
    result: dict[str, Any] | None = job["result"]
    return result
