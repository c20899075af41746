"""Jobs: list them, look at them, cancel them; and how a request becomes one."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from bonsai_lora import errors
from bonsai_lora.api.body import header_of
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.job_schemas import Job, JobKind, JobPage
from bonsai_lora.api.openapi import extra_response, problems
from bonsai_lora.api.query import DECIMAL
from bonsai_lora.service.jobs import Work
from bonsai_lora.wire.media import Form

router = APIRouter(tags=["jobs"])

JOB = extra_response(202, "with `Prefer: respond-async`: the job", Job)
"""The answer of a route that may become a job."""

JobId = Annotated[
    str,
    Path(
        description="id of a job",
        examples=["019a1f2b3c4d0123456789abcdef"],
    ),
]


@router.get(
    "/v1/jobs",
    summary="List the jobs of the caller, the newest first",
    responses=problems(errors.InvalidRequestError, errors.StoreUnreachableError),
)
async def list_jobs(
    context: ContextDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="most jobs per page"), DECIMAL] = 100,
    cursor: Annotated[
        str, Query(max_length=64, description="`next_cursor` of the previous page")
    ] = "",
) -> JobPage:
    """Finished jobs are kept for a day. Their results are null here. A key sees the jobs that it
    has started, and one with the scope `admin` all jobs.
    """
    found = await context.jobs.page(context.store.key, limit + 1, cursor or None)
    jobs = [Job.of(one) for one in found[:limit]]
    return JobPage(jobs=jobs, next_cursor=jobs[-1].id if len(found) > limit else None)


@router.get(
    "/v1/jobs/{job}",
    summary="Show a job",
    responses=problems(errors.JobNotFoundError, errors.StoreUnreachableError),
)
async def get_job(context: ContextDep, job: JobId) -> Job:
    """Returns its state, its progress, and its result or error. Any worker answers."""
    found = await context.jobs.get(context.store.key, job)
    return Job.of(found, await context.jobs.result(found))


@router.delete(
    "/v1/jobs/{job}",
    summary="Cancel a job",
    responses=problems(
        errors.JobNotFoundError,
        errors.StoreFullError,
        errors.StoreReadOnlyError,
        errors.StoreUnreachableError,
    ),
)
async def cancel_job(context: ContextDep, job: JobId) -> Job:
    """A queued job is cancelled at once. A running one stops before its next piece of work, within
    seconds, and then stores nothing. A finished one stays as it is.
    """
    found = await context.jobs.cancel(context.store.key, job)
    return Job.of(found, await context.jobs.result(found))


def wants_job(request: Request) -> bool:
    """Return whether the caller prefers a job to waiting (RFC 7240, section 4.1)."""
    preferences = (header_of(request, "prefer") or "").lower().split(",")
    return any(one.partition(";")[0].strip() == "respond-async" for one in preferences)


async def start_job(context: Context, kind: JobKind, needed_bytes: int, work: Work) -> Response:
    """Start a job for the caller and return 202; raises BusyError, MemoryBudgetError."""
    record = await context.jobs.submit(context.store.key, kind, needed_bytes, work)
    headers = {
        "Location": f"{context.settings.root_path}/v1/jobs/{record.id}",
        "Preference-Applied": "respond-async",
    }
    return Response(Job.of(record).model_dump_json(), 202, headers, Form.JSON)
