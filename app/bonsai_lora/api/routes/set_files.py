"""Download sets as PEFT files, and as GGUF LoRAs."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from bonsai_lora import errors
from bonsai_lora.api.deps import ContextDep, WantedSet
from bonsai_lora.api.merged_file import CountedFile
from bonsai_lora.api.openapi import VERSION_ERRORS, file_responses, problems
from bonsai_lora.api.ranges import BytesFile, file_response
from bonsai_lora.service import gguf_lora, sets
from bonsai_lora.service.budget import Reservation
from bonsai_lora.wire.media import Form

router = APIRouter(tags=["sets"])

_FILE_ERRORS = (
    *VERSION_ERRORS,
    errors.RangeNotSatisfiableError,
    errors.BusyError,
)


@router.get(
    "/v1/sets/{set}/adapter_config.json",
    summary="Download a set's PEFT configuration",
    response_class=Response,
    responses=file_responses(Form.JSON) | problems(*_FILE_ERRORS),
)
async def get_adapter_config(request: Request, context: ContextDep, stored: WantedSet) -> Response:
    """Put it in a folder with `adapter_model.safetensors`, and `peft` loads the folder."""
    # The ETag must differ per file: Hub clients name cached files by it.
    etag = f'{stored.record.etag[:-1]}-config"'
    file = BytesFile(memoryview(sets.export_config(stored)), etag, Form.JSON)
    return file_response(request, file, context.long)


@router.get(
    "/v1/sets/{set}/adapter_model.safetensors",
    summary="Download a set's weights under PEFT's names",
    response_class=Response,
    responses=file_responses(Form.BINARY) | problems(*_FILE_ERRORS),
)
async def get_adapter_model(request: Request, context: ContextDep, stored: WantedSet) -> Response:
    """Uploaded tensors keep their dtype and are returned bit for bit."""
    file = BytesFile(stored.file, stored.record.etag, Form.BINARY)
    return file_response(request, file, context.long)


@router.get(
    "/v1/sets/{set}/adapter.gguf",
    summary="Download a set as a GGUF LoRA for llama.cpp",
    response_class=Response,
    responses=file_responses("application/octet-stream")
    | problems(
        *_FILE_ERRORS,
        errors.UnsupportedAdapterError,
        errors.UnsupportedGgufError,
        errors.InvalidBaseError,
        errors.MemoryBudgetError,
    ),
)
async def get_adapter_gguf(
    request: Request,
    context: ContextDep,
    stored: WantedSet,
    dtype: Annotated[
        gguf_lora.LoraDtype, Query(description="type of the tensors; F32 is exact")
    ] = "F32",
    architecture: Annotated[
        str | None,
        Query(max_length=100, description="general.architecture of the base's GGUF file"),
    ] = None,
    folded: Annotated[
        bool, Query(description="fold A for a base whose weights are Hadamard-folded")
    ] = False,
) -> Response:
    """With it, llama.cpp computes exactly this set: rsLoRA and patterns become part of the factors.
    The architecture is, unless given, that of the base if it is served here, else that of the GGUF
    LoRA that was uploaded, else qwen3 if all modules have names in it.
    """
    made = await context.long.run(
        gguf_lora.export_gguf, stored, context.bases, dtype, architecture, is_folded=folded
    )
    with Reservation(context.memory) as reserved:
        reserved.add(made.working_bytes)
        await context.long.run(context.checked_files.check, made)
    file = CountedFile(made, context.executor, context.memory, made.working_bytes)
    return file_response(request, file, context.long)
