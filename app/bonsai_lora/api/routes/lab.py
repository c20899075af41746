"""The laboratory: combine sets, compare them, and look at their spectra."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request, Response

from bonsai_lora import errors
from bonsai_lora.api import lab_schemas
from bonsai_lora.api.body import read_model
from bonsai_lora.api.deps import ContextDep, SetName, WantedVersion
from bonsai_lora.api.described import described, set_headers
from bonsai_lora.api.openapi import (
    BODY_ERRORS,
    STORE_ERRORS,
    extra_response,
    problems,
    request_body,
)
from bonsai_lora.api.openapi_headers import sends
from bonsai_lora.api.routes.bases import (
    MERGE_ERRORS,
    BaseName,
    Match,
    Others,
    Scale,
    Weights,
)
from bonsai_lora.service import combine, compare, survival
from bonsai_lora.service.aligned import MAX_SETS
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.merged import weighted_sets
from bonsai_lora.service.sets import get_adapter
from bonsai_lora.service.work import Place

router = APIRouter(tags=["laboratory"])

T = TypeVar("T")


@router.post(
    "/v1/combine",
    operation_id="combine_sets",
    summary="Combine sets into a new one",
    status_code=201,
    response_model=lab_schemas.CombinedSet,
    openapi_extra=request_body(lab_schemas.CombineSets),
    responses=extra_response(
        200, "with `dry_run`: the report alone; nothing is stored", lab_schemas.CombineReport
    )
    | sends(201, "ETag", "Location")
    | problems(
        *BODY_ERRORS,
        *STORE_ERRORS,
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
    and replaced parameters have no sum in LoRA form and are refused.
    """
    with Place(context.long) as place, Reservation(context.memory) as reserved:
        wanted = await read_model(request, lab_schemas.CombineSets, place)
        check = partial(
            combine.plan,
            context.store,
            context.limits,
            wanted.name,
            [(one.set, one.weight) for one in wanted.sets],
            wanted.recipe(),
        )
        plan = await context.long.run(check)
        reserved.add(plan.result_bytes() + context.settings.threads * plan.work_bytes())
        combined = await context.long.run_each(plan.works(), context.settings.threads)
        report = await context.long.run(partial(plan.report, combined))
        if dry_run:
            show = partial(lab_schemas.CombineReport.of, report)
            return await described(context, show, len(combined), {})
        stored = await context.long.run(partial(plan.store, context.store, context.limits, report))
        made = partial(lab_schemas.CombinedSet.made, stored, report)
        headers = set_headers(context, stored, 201)
        return await described(context, made, len(combined), headers, 201)


@router.get(
    "/v1/compare",
    operation_id="compare_sets",
    summary="Compare sets: norms, cosines and interference",
    response_model=lab_schemas.ComparisonInfo,
    responses=problems(
        errors.InvalidRequestError,
        errors.SetNotFoundError,
        errors.ShapeMismatchError,
        errors.AnswerTooLargeError,
        errors.MemoryBudgetError,
        errors.BusyError,
    ),
)
async def compare_sets(
    context: ContextDep,
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
    that a set lacks counts as zero.
    """
    with context.long.admit(), Reservation(context.memory) as reserved:
        check = partial(compare.compare, context.store, context.limits, names)
        comparison = await context.long.run(check)
        reserved.add(context.settings.threads * comparison.work_bytes())
        modules = await context.long.run_each(comparison.works(), context.settings.threads)
        show = partial(lab_schemas.ComparisonInfo.of, comparison, modules)
        return await described(context, show, len(names) * len(modules), {})


@router.get(
    "/v1/sets/{set}/spectrum",
    operation_id="get_spectrum",
    summary="Show the singular values of a set's deltas",
    response_model=lab_schemas.SetSpectrum,
    responses=problems(
        errors.InvalidRequestError,
        errors.SetNotFoundError,
        errors.VersionNotFoundError,
        errors.AdapterNotFoundError,
        errors.BusyError,
    ),
)
async def get_spectrum(
    context: ContextDep,
    name: SetName,
    modules: Annotated[
        list[str], Query(alias="module", description="only these modules; repeatable")
    ] = [],  # noqa: B006 - FastAPI copies it
    version: WantedVersion = None,
) -> Response:
    """Returns singular values, norms and ranks of scaling * B @ A, from small matrices. They are
    remembered as long as the version of the set is open.
    """
    stored = await context.open_version(name, version)
    adapters = {one: get_adapter(stored, one) for one in modules} or dict(
        stored.lora_set.registry.adapters
    )
    with context.long.admit():
        works = [
            partial(lab_schemas.ModuleSpectrum.of, module, one) for module, one in adapters.items()
        ]
        found = await context.long.run_each(works, context.settings.threads)
    return await described(context, partial(_spectrum, found), len(found), {})


def _spectrum(found: Sequence[lab_schemas.ModuleSpectrum]) -> lab_schemas.SetSpectrum:
    return lab_schemas.SetSpectrum(modules=list(found))


@router.get(
    "/v1/bases/{base}/survival/{set}",
    operation_id="get_survival",
    summary="Estimate what is left of a set's deltas in stored merged weights",
    response_model=lab_schemas.SurvivalInfo,
    responses=problems(*MERGE_ERRORS),
)
async def get_survival(
    context: ContextDep,
    base: BaseName,
    name: SetName,
    scale: Scale = 1.0,
    others: Others = None,
    weights: Weights = None,
    match: Match = None,
    dtype: Annotated[
        lab_schemas.StoredDtype, Query(description="type in which the merged weights are stored")
    ] = "BF16",
) -> Response:
    """Stores a sample of the base's rows with and without the deltas, and compares: every row of
    small tensors, and rows at equal distances, 262,144 values in all, of larger ones.
    """
    with context.long.admit():
        sets = weighted_sets(name, scale, others or [], weights or [])
        choose = partial(context.models.get, context.store, base, sets, match)
        model = await context.long.run(choose)
        estimate = await context.long.run(partial(survival.estimate, model, dtype))
        found = await context.long.run_each(estimate.works(), context.settings.threads)
    return await described(
        context, partial(lab_schemas.SurvivalInfo.of, estimate, found), len(found), {}
    )
