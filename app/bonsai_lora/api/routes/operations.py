"""Health probes and metrics."""

import os
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Response

from bonsai_lora import errors
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.openapi import problems
from bonsai_lora.api.operations_schemas import Health, Readiness

router = APIRouter(tags=["operations"])

_MOST_NAMES = 1000


@router.get("/healthz", summary="Is the process alive?", responses=problems())
async def get_health() -> Health:
    """Responds as long as the process is running."""
    return Health()


@router.get(
    "/readyz",
    summary="Is the store readable?",
    response_model_exclude_unset=True,
    responses=problems(errors.BusyError, errors.ShuttingDownError),
)
async def get_readiness(context: ContextDep) -> Readiness:
    """Also reports what needs a person: files that could not be read, sets that a newer release
    wrote, adapters that were put into the store's folder, a read-only store, and a folder of bases
    that does not exist. Files are named, up to 1,000, only if the service needs no keys. Answers
    503 while the service drains before it stops.
    """
    context.check_ready()
    return await anyio.to_thread.run_sync(_readiness, context)


def _readiness(context: Context) -> Readiness:
    store, bases = context.store, context.settings.bases
    sums, dropped = store.all_sums(), store.dropped()
    names: dict[str, Any] = {}
    if store.key.sees_all:
        names["bad_files"] = store.bad_files(_MOST_NAMES)
        names["newer_files"] = [*store.newer_files()][:_MOST_NAMES]
        names["not_imported"] = dropped.advice()
    is_reachable = store.state().is_reachable
    if is_reachable is not None:
        names["store"] = "reachable" if is_reachable else "unreachable"
    return Readiness(
        status="ready",
        sets=sums.sets,
        bad_file_count=store.count_bad_files(),
        newer_file_count=sums.newer,
        not_imported_count=dropped.count,
        **names,
        store_writable=store.is_writable(),
        bases_readable=os.access(bases, os.R_OK | os.X_OK) if bases else None,
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses=problems()
    | {
        200: {
            "description": "plain text",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
async def get_metrics(context: ContextDep) -> Response:
    """Requests and latency by route, rows applied, bytes merged, and the size of the store."""
    text = await anyio.to_thread.run_sync(context.metrics.render)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
