"""The Open Inference Protocol's extension for system shared memory."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from pydantic import AfterValidator

from bonsai_lora.api import oip_schemas
from bonsai_lora.api.body import parse_model, read_body
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.middleware import decode_slashes
from bonsai_lora.api.openapi import empty_responses, oip_errors, request_body

router = APIRouter(prefix="/v2/systemsharedmemory", tags=["open inference protocol"])

_REGISTER_BYTES = 1 << 16

RegionPath = Annotated[
    str, AfterValidator(decode_slashes), Path(description="name of a shared-memory region")
]


@router.get(
    "/status",
    summary="List all shared-memory regions",
    responses=oip_errors(501),
)
async def get_shared_memory(context: ContextDep) -> list[oip_schemas.RegionInfo]:
    """Available if the service was started with `--shared-memory`."""
    return [oip_schemas.RegionInfo.model_validate(one) for one in context.regions.registered()]


@router.get(
    "/region/{region}/status",
    summary="Show a shared-memory region",
    responses=oip_errors(404, 501),
)
async def get_shared_memory_region(
    context: ContextDep, region: RegionPath
) -> list[oip_schemas.RegionInfo]:
    """Returns a list with one entry, as Triton does."""
    return [oip_schemas.RegionInfo.model_validate(context.regions.get(region))]


@router.post(
    "/region/{region}/register",
    summary="Register a shared-memory region",
    response_class=Response,
    openapi_extra=request_body(oip_schemas.RegisterRequest),
    responses=empty_responses() | oip_errors(400, 501),
)
async def register_shared_memory(
    request: Request, context: ContextDep, region: RegionPath
) -> Response:
    """The shared memory must exist. The service never deletes it."""
    requested = parse_model(await read_body(request, _REGISTER_BYTES), oip_schemas.RegisterRequest)
    context.regions.register(region, requested.key, requested.offset, requested.byte_size)
    return Response()


@router.post(
    "/region/{region}/unregister",
    summary="Unregister a shared-memory region",
    response_class=Response,
    responses=empty_responses() | oip_errors(501),
)
async def unregister_shared_memory_region(context: ContextDep, region: RegionPath) -> Response:
    """Does nothing if no region has this name."""
    context.regions.unregister(region)
    return Response()


@router.post(
    "/unregister",
    summary="Unregister all shared-memory regions",
    response_class=Response,
    responses=empty_responses() | oip_errors(501),
)
async def unregister_shared_memory(context: ContextDep) -> Response:
    """The shared memory itself is kept."""
    for one in context.regions.registered():
        context.regions.unregister(one.name)
    return Response()
