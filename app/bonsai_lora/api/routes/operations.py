"""Health probes and metrics."""

import anyio.to_thread
from fastapi import APIRouter, Response

from bonsai_lora import errors
from bonsai_lora.api import schemas
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.openapi import problems

router = APIRouter(tags=["operations"])


@router.get(
    "/healthz", operation_id="get_health", summary="Is the process alive?", responses=problems()
)
async def get_health() -> schemas.Health:
    """Responds as long as the process is running."""
    return schemas.Health()


@router.get(
    "/readyz",
    operation_id="get_readiness",
    summary="Is the store readable?",
    response_model_exclude_none=True,
    responses=problems(errors.BusyError),
)
async def get_readiness(context: ContextDep) -> schemas.Readiness:
    """Also counts files that could not be read, and sets that a newer release wrote; names them if
    the service needs no keys.
    """
    store = context.store
    totals = await anyio.to_thread.run_sync(store.totals)
    has_names = store.key.sees_all
    return schemas.Readiness(
        sets=totals.sets,
        bad_file_count=totals.bad_files,
        newer_file_count=totals.newer_files,
        bad_files=store.bad_files() if has_names else None,
        newer_files=list(store.newer_files()) if has_names else None,
    )


@router.get(
    "/metrics",
    operation_id="get_metrics",
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
