"""Statistics of sets and of the store, and memory estimates."""

from time import monotonic
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query

from bonsai_lora import errors
from bonsai_lora.api import schemas
from bonsai_lora.api.deps import ContextDep, WantedSet
from bonsai_lora.api.openapi import VERSION_ERRORS, problems
from bonsai_lora.api.query import Count
from bonsai_lora.core.registry import LoraRegistry, adapter_bytes
from bonsai_lora.service.stats import store_stats

router = APIRouter(tags=["statistics"])

Width = Annotated[Count, Query(description="width of the module")]
Rank = Annotated[Count, Query(description="rank of the adapters")]
Budget = Annotated[Count, Query(description="memory for all adapters, in bytes")]


@router.get(
    "/v1/sets/{set}/stats",
    summary="Show the statistics of a set",
    responses=problems(*VERSION_ERRORS, errors.BusyError),
)
async def get_set_stats(
    context: ContextDep,
    stored: WantedSet,
    base_param_count: Annotated[
        Count | None, Query(description="parameters of the base model")
    ] = None,
) -> schemas.SetStats:
    """Returns parameter counts, and the norm and effective rank of each delta, computed from r x r
    Gram matrices.
    """
    with context.long.admit():
        # One module at a time, so that other work can run in between.
        adapters = stored.lora_set.registry.adapters
        modules = [
            await context.long.run(schemas.ModuleStatsInfo.of, *item) for item in adapters.items()
        ]
    ratio = None if base_param_count is None else stored.lora_set.efficiency_ratio(base_param_count)
    record = stored.record
    return schemas.SetStats(
        adapter_count=record.adapter_count,
        total_trainable_params=record.total_trainable_params,
        total_memory_bytes=record.total_memory_bytes,
        base_param_count=base_param_count,
        efficiency_ratio=ratio,
        modules=modules,
    )


@router.get(
    "/v1/stats",
    summary="Show the statistics of the store",
    response_model_exclude_unset=True,
    responses=problems(),
)
async def get_stats(context: ContextDep) -> schemas.StoreStatsInfo:
    """Returns totals over all sets, and the largest sets."""
    stats = await anyio.to_thread.run_sync(store_stats, context.store)
    return schemas.StoreStatsInfo(
        set_count=stats.sums.sets,
        adapter_count=stats.sums.adapters,
        total_trainable_params=stats.sums.params,
        total_memory_bytes=stats.sums.held_bytes,
        memory_budget_bytes=context.limits.memory_budget_bytes,
        resident_bytes=stats.resident_bytes,
        uptime_seconds=monotonic() - context.started,
        sets=[schemas.SetSummary.model_validate(one) for one in stats.largest.records],
        **({} if stats.largest.as_of is None else {"as_of": stats.largest.as_of}),
    )


@router.get(
    "/v1/estimate",
    summary="Estimate how many adapters fit in a budget",
    responses=problems(errors.InvalidRequestError),
)
async def estimate(d_in: Width, d_out: Width, rank: Rank, budget_bytes: Budget) -> schemas.Estimate:
    """Returns 0 if not even one adapter fits, or if adapters have no parameters."""
    return schemas.Estimate(
        adapters=LoraRegistry.estimate_adapters_for_budget(d_in, d_out, rank, budget_bytes),
        bytes_per_adapter=adapter_bytes(d_in, d_out, rank),
    )
