"""The laboratory: combine sets, compare them, and look at their spectra."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from bonsai_lora import errors
from bonsai_lora.api import lab_schemas
from bonsai_lora.api.body import read_model
from bonsai_lora.api.call import BufferResponse
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep, SentMemory, WantedSet
from bonsai_lora.api.job_schemas import Job, JobKind
from bonsai_lora.api.json_response import json_response, set_headers
from bonsai_lora.api.openapi import (
    CHANGE_ERRORS,
    VERSION_ERRORS,
    extra_response,
    problems,
    request_body,
)
from bonsai_lora.api.openapi_headers import sends
from bonsai_lora.api.routes.bases import MERGE_ERRORS, ModelQuery
from bonsai_lora.api.routes.jobs import JOB, start_job, wants_job
from bonsai_lora.service import combine, compare, extract, survival
from bonsai_lora.service.adapters import get_adapter
from bonsai_lora.service.aligned import MAX_SETS
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.jobs import LONG_NANOSECONDS, Progress
from bonsai_lora.service.spectrum import Spectra
from bonsai_lora.service.work import Lane, Place
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.media import Form

router = APIRouter(tags=["laboratory"])


@router.post(
    "/v1/combine",
    summary="Combine sets into a new one",
    status_code=201,
    response_model=lab_schemas.CombinedSet,
    openapi_extra=request_body(lab_schemas.CombineSets),
    responses=extra_response(
        200, "with `dry_run`: the report alone; nothing is stored", lab_schemas.CombineReport
    )
    | sends(201, "ETag", "Location")
    | JOB
    | problems(
        *CHANGE_ERRORS,
        errors.SetNotFoundError,
        errors.SetExistsError,
        errors.InvalidNameError,
        errors.ShapeMismatchError,
        errors.UnsupportedAdapterError,
        errors.NonFiniteOutputError,
        errors.RankTooLargeError,
        errors.TooManyModulesError,
    ),
)
async def combine_sets(
    request: Request,
    context: ContextDep,
    dry_run: Annotated[bool, Query(description="compute the report, and store nothing")] = False,
) -> Response:
    """Computes the new set from the factors of the others, one module after the other. DoRA, biases
    and replaced parameters have no sum in LoRA form and are refused. With `Prefer: respond-async`
    it is checked now and computed as a job.
    """
    with Place(context.long) as place, Reservation(context.memory) as reserved:
        wanted = await read_model(request, lab_schemas.CombineSets, place)
        plan = await context.long.run(
            combine.plan,
            context.store,
            wanted.name,
            [(one.set, one.weight) for one in wanted.sets],
            wanted.recipe(),
        )
        needed = plan.result_bytes() + context.settings.threads * plan.work_bytes()
        if wants_job(request):
            work = partial(_combine_as_job, context, plan, dry_run)
            return await start_job(context, "combine", needed, work)
        reserved.add(needed)
        show, stored = await _combine(context, context.long, plan, dry_run, Progress())
        headers = {} if stored is None else set_headers(context, stored, 201)
        status = 200 if stored is None else 201
        return await json_response(context, show, len(plan.modules), headers, status)


async def _combine_as_job(
    context: Context, plan: combine.Plan, dry_run: bool, progress: Progress
) -> dict[str, Any]:
    show, _ = await _combine(context, context.jobs.lane, plan, dry_run, progress)
    return await _result(context, show)


async def _result(context: Context, show: Callable[[], BaseModel]) -> dict[str, Any]:
    """Return the result of a job, which is the model that `show` makes."""
    return await context.jobs.lane.run(lambda: show().model_dump(mode="json"))


async def _combine(
    context: Context, lane: Lane, plan: combine.Plan, dry_run: bool, progress: Progress
) -> tuple[Callable[[], BaseModel], StoredSet | None]:
    """Compute a combination, and store it unless it is a dry run; return what shows it."""
    combined = await lane.run_each(plan.works(progress), context.settings.threads)
    report = await lane.run(plan.report, combined)
    progress.check()
    if dry_run:
        return partial(lab_schemas.CombineReport.of, report), None
    stored = await lane.run(plan.store, context.store, report)
    return partial(lab_schemas.CombinedSet.made, stored, report), stored


@router.post(
    "/v1/extract",
    summary="Extract a set from a fine-tuned model, as a job",
    status_code=202,
    response_model=Job,
    openapi_extra=request_body(lab_schemas.ExtractSet),
    responses=problems(
        *CHANGE_ERRORS,
        errors.SetExistsError,
        errors.InvalidNameError,
        errors.BaseNotFoundError,
        errors.InvalidBaseError,
        errors.BaseChangedError,
        errors.ShapeMismatchError,
        errors.UnsupportedGgufError,
        errors.RankTooLargeError,
    ),
)
async def extract_set(request: Request, context: ContextDep) -> Response:
    """Compares both models tensor by tensor, in bounded memory. The job's result is the new set
    with a report; until then nothing is stored.
    """
    with Place(context.long) as place:
        wanted = await read_model(request, lab_schemas.ExtractSet, place)
        plan = await context.long.run(
            extract.plan,
            context.store,
            context.bases,
            wanted.name,
            wanted.base,
            wanted.tuned,
            wanted.rank,
            wanted.energy,
            wanted.modules,
        )
        needed = context.settings.threads * plan.work_bytes()
        return await start_job(context, "extract", needed, partial(_extract, context, plan))


async def _extract(context: Context, plan: extract.Plan, progress: Progress) -> dict[str, Any]:
    lane = context.jobs.lane
    with Reservation(context.memory) as reserved:
        works = plan.works(progress, reserved)
        found = await lane.run_each(works, context.settings.threads)
        report = plan.report(found)
        progress.check()
        stored = await lane.run(plan.store, context.store, report)
        return await _result(context, partial(lab_schemas.ExtractedSet.made, stored, report))


@router.get(
    "/v1/compare",
    summary="Compare sets: norms, cosines and interference",
    response_model=lab_schemas.ComparisonInfo,
    responses=JOB
    | problems(
        errors.InvalidRequestError,
        errors.SetNotFoundError,
        errors.ShapeMismatchError,
        errors.AnswerTooLargeError,
        errors.MemoryBudgetError,
        errors.BusyError,
    ),
)
async def compare_sets(
    request: Request,
    context: ContextDep,
    memory: SentMemory,
    names: Annotated[
        list[str],
        Query(
            alias="set",
            min_length=1,
            max_length=MAX_SETS,
            description="name of a set; repeat it for each",
            examples=[["alice", "bob"]],
        ),
    ],
) -> Response:
    """Returns figures of scaling * B @ A, whole and by module, from small Gram matrices. A module
    that a set lacks counts as zero. With `Prefer: respond-async`, what takes longer than a second
    becomes a job.
    """
    with context.long.admit():
        comparison = await context.long.run(compare.compare, context.store, names)
        show = partial(lab_schemas.ComparisonInfo.of, comparison)
        return await _computed(request, context, memory, "compare", comparison, show)


@router.get(
    "/v1/sets/{set}/spectrum",
    summary="Show the singular values of a set's deltas",
    response_model=lab_schemas.SetSpectrum,
    responses=JOB
    | problems(
        *VERSION_ERRORS, errors.AdapterNotFoundError, errors.MemoryBudgetError, errors.BusyError
    ),
)
async def get_spectrum(
    request: Request,
    context: ContextDep,
    memory: SentMemory,
    stored: WantedSet,
    modules: Annotated[
        list[str], Query(alias="module", description="only these modules; repeatable")
    ] = [],  # noqa: B006 - FastAPI copies it
) -> Response:
    """Returns singular values, norms and ranks of scaling * B @ A, from small matrices. They are
    remembered as long as the version of the set is open. With `Prefer: respond-async`, what takes
    longer than a second becomes a job.
    """
    adapters = {one: get_adapter(stored, one) for one in modules} or dict(
        stored.lora_set.registry.adapters
    )
    spectra = Spectra(adapters)
    with context.long.admit():
        return await _computed(
            request,
            context,
            memory,
            "spectrum",
            spectra,
            lambda _: lab_schemas.SetSpectrum.of(spectra),
        )


_NO_RECORD = (errors.StoreFullError, errors.StoreReadOnlyError, errors.StoreUnreachableError)
"""Why a job may not be stored."""


async def _computed(
    request: Request,
    context: Context,
    memory: Reservation,
    kind: JobKind,
    plan: compare.Comparison | Spectra,
    show: Callable[[list[Any]], BaseModel],
) -> Response:
    """Compute each module, and answer with what `show` makes of the results.

    `memory` counts the results until the answer has been sent.
    Answers with a job instead if the caller prefers that, the work is long, and jobs can be stored.
    """
    threads = context.settings.threads
    needed = threads * plan.work_bytes()
    if wants_job(request) and plan.nanoseconds() > threads * LONG_NANOSECONDS:
        with suppress(*_NO_RECORD):
            work = partial(_as_job, context, plan, show)
            return await start_job(context, kind, plan.result_bytes() + needed, work)
    memory.add(plan.result_bytes())
    with Reservation(context.memory) as reserved:
        reserved.add(needed)
        found: list[Any] = await context.long.run_each(plan.works(Progress()), threads)
    content = await context.long.run(lambda: show(found).model_dump_json().encode())
    # In pieces, each of which waits for the client, so that `memory` is held as long.
    return BufferResponse([content], Form.JSON)


async def _as_job(
    context: Context,
    plan: compare.Comparison | Spectra | survival.Followed,
    show: Callable[[list[Any]], BaseModel],
    progress: Progress,
) -> dict[str, Any]:
    works: list[Callable[[], Any]] = [*plan.works(progress)]
    found = await context.jobs.lane.run_each(works, context.settings.threads)
    return await _result(context, partial(show, found))


@dataclass(frozen=True, slots=True)
class _SurvivalQuery(ModelQuery):
    """How the weights of a merged model would be stored."""

    dtype: Annotated[
        survival.StoredDtype, Query(description="type in which the merged weights are stored")
    ] = "BF16"


async def _followed(
    context: ContextDep, query: Annotated[_SurvivalQuery, Depends()]
) -> survival.Followed:
    with context.long.admit():
        model = await context.long.run(query.model, context)
        context.gains.prepare(model.base)
        return await context.long.run(survival.follow, model, query.dtype)


Followed = Annotated[survival.Followed, Depends(_followed)]


@router.get(
    "/v1/bases/{base}/survival/{set}",
    summary="Estimate what is left of a set's deltas in stored merged weights",
    response_model=lab_schemas.SurvivalInfo,
    responses=problems(*MERGE_ERRORS),
)
async def get_survival(context: ContextDep, followed: Followed) -> Response:
    """Stores a sample of the base's rows with and without the deltas, and compares: every row of
    small tensors, and rows at equal distances, 262,144 values in all, of larger ones.
    """
    with context.long.admit():
        found = await context.long.run_each(followed.estimates(), context.settings.threads)
    show = partial(lab_schemas.SurvivalInfo.of, followed, found, is_exact=False)
    return await json_response(context, show, len(found), {})


@router.post(
    "/v1/bases/{base}/survival/{set}",
    summary="Compute what is left of a set's deltas in stored merged weights, as a job",
    status_code=202,
    response_model=Job,
    responses=problems(
        *MERGE_ERRORS, errors.MemoryBudgetError, errors.StoreFullError, errors.StoreReadOnlyError
    ),
)
async def start_survival(context: ContextDep, followed: Followed) -> Response:
    """Stores all rows of the changed tensors with and without the deltas, in memory. The job's
    result is as that of the GET.
    """
    needed = context.settings.threads * followed.work_bytes()
    show = partial(lab_schemas.SurvivalInfo.of, followed, is_exact=True)
    work = partial(_as_job, context, followed, show)
    return await start_job(context, "survival", needed, work)
