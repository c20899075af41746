"""Create, list, show, upload and delete sets."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Request, Response

from bonsai_lora import errors
from bonsai_lora.api import schemas
from bonsai_lora.api.body import media_type, read_model
from bonsai_lora.api.conditions import not_modified, precondition
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep, SetName, WantedSet
from bonsai_lora.api.json_response import json_response, set_headers
from bonsai_lora.api.openapi import (
    CHANGE_ERRORS,
    STORE_ERRORS,
    VERSION_ERRORS,
    extra_response,
    problems,
    request_body,
)
from bonsai_lora.api.openapi_headers import sends
from bonsai_lora.api.query import DECIMAL
from bonsai_lora.api.uploads import CONFIG_PART, GGUF_PART, MODEL_PART, receive_adapter
from bonsai_lora.formats.experts import ExpertLayout
from bonsai_lora.formats.names import SET_NAME_PATTERN
from bonsai_lora.service import gguf_lora, sets
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.keys import check_scope
from bonsai_lora.service.pull import pull_set
from bonsai_lora.service.work import Place
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.storage.upload import Upload, WholeUpload
from bonsai_lora.wire.media import Form, curl_hint

router = APIRouter(tags=["sets"])

_FILE_OF_PART = {
    CONFIG_PART: "adapter_config.json",
    MODEL_PART: "adapter_model.safetensors, or adapters.safetensors",
    GGUF_PART: "a GGUF LoRA, as llama.cpp reads it, in place of the others",
}
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "title": "AdapterUpload",
                    "oneOf": [
                        {"required": [CONFIG_PART, MODEL_PART]},
                        {"required": [GGUF_PART]},
                    ],
                    "properties": {
                        part: {"type": "string", "format": "binary", "description": file}
                        for part, file in _FILE_OF_PART.items()
                    },
                }
            },
            **request_body(schemas.PullSet)["requestBody"]["content"],
        },
    }
}


@router.post(
    "/v1/sets",
    summary="Create a set of newly initialized adapters",
    status_code=201,
    response_model=schemas.SetInfo,
    openapi_extra=request_body(schemas.CreateSet),
    responses=sends(201, "ETag", "Location")
    | problems(
        *CHANGE_ERRORS,
        errors.SetExistsError,
        errors.InvalidNameError,
        errors.RankTooLargeError,
        errors.TooManyModulesError,
    ),
)
async def create_set(request: Request, context: ContextDep) -> Response:
    """Creates adapters with A uniform and B zero, so that they change nothing before training, or
    an empty set.
    """
    _check_not_an_upload(request)
    with Place(context.long) as place:
        wanted = await read_model(request, schemas.CreateSet, place)
        shapes, base_model_name = wanted.shapes()
        stored = await context.long.run(
            sets.create_set,
            context.store,
            context.memory,
            wanted.name,
            base_model_name,
            wanted.config.to_core(),
            shapes,
        )
    return await _info(context, stored, 201)


async def _info(context: Context, stored: StoredSet, status: int = 200) -> Response:
    make = partial(schemas.SetInfo.of, stored)
    headers = set_headers(context, stored, status)
    return await json_response(context, make, stored.record.adapter_count, headers, status)


def _check_not_an_upload(request: Request) -> None:
    """Raise UnsupportedMediaTypeError for anything but JSON, as it is probably an adapter."""
    media = media_type(request, Form.JSON)
    if media != Form.JSON:
        raise errors.UnsupportedMediaTypeError(
            f"POST /v1/sets creates a set from JSON, but Content-Type is {media[:100]!r}; send "
            f"{Form.JSON}{curl_hint(media)}, or upload an adapter with PUT /v1/sets/{{set}}",
            got=media,
            expected=[Form.JSON],
        )


@router.get(
    "/v1/sets",
    summary="List the sets by name, a page at a time",
    response_model_exclude_unset=True,
    responses=problems(
        errors.InvalidRequestError, errors.StoreUnreachableError, errors.UnsupportedFeatureError
    ),
)
async def list_sets(
    context: ContextDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="most sets per page"), DECIMAL] = 100,
    cursor: Annotated[
        str | None,
        Query(
            pattern=f"{SET_NAME_PATTERN}|^$",
            description="`next_cursor` of the previous page; empty for the first page",
        ),
    ] = None,
    base_model_name: Annotated[str | None, Query(description="only sets for this model")] = None,
    prefix: Annotated[
        str, Query(max_length=96, description="only sets whose names begin with this")
    ] = "",
) -> schemas.SetPage:
    """Sets are sorted by name. A set created between two pages appears if its name is still
    ahead.
    """
    page = partial(
        sets.list_sets,
        context.store,
        limit=limit,
        cursor=cursor,
        base_model_name=base_model_name,
        prefix=prefix,
    )
    found, next_cursor = await anyio.to_thread.run_sync(page)
    summaries = [schemas.SetSummary.model_validate(one) for one in found.records]
    as_of = {} if found.as_of is None else {"as_of": found.as_of}
    return schemas.SetPage(sets=summaries, next_cursor=next_cursor, **as_of)


@router.get(
    "/v1/sets/{set}",
    summary="Show a set",
    response_model=schemas.SetInfo,
    responses=extra_response(304, "not modified: If-None-Match names the current ETag")
    | problems(*VERSION_ERRORS),
)
async def get_set(request: Request, context: ContextDep, stored: WantedSet) -> Response:
    """Returns the set's configuration and modules, without its weights."""
    etag = stored.record.etag
    if not_modified(request, etag):
        return Response(status_code=304, headers={"ETag": etag})
    return await _info(context, stored)


@dataclass(frozen=True, slots=True)
class _UploadOptions(sets.ImportOptions):
    """The query of an upload."""

    base_model_name: Annotated[
        str | None,
        Query(max_length=1024, description="replaces the base model name in the upload"),
    ] = None
    expert_b_layout: Annotated[
        ExpertLayout | None,
        Query(description="column order of B for fused experts; PEFT writes rank_major"),
    ] = None
    architecture: Annotated[
        str | None,
        Query(
            max_length=100,
            description="whose tensor names a GGUF LoRA has, in place of its general.architecture",
        ),
    ] = None


UploadOptions = Annotated[_UploadOptions, Depends()]


@router.put(
    "/v1/sets/{set}",
    summary="Upload a PEFT, MLX or GGUF adapter as a set",
    response_model=schemas.ImportReport,
    openapi_extra=_UPLOAD_BODY,
    responses=extra_response(
        201, "created: no set had this name", schemas.ImportReport, "ETag", "Location"
    )
    | sends(200, "ETag")
    | problems(
        errors.MalformedMultipartError,
        errors.MalformedSafetensorsError,
        errors.MalformedGgufError,
        errors.UnsupportedGgufError,
        errors.InvalidBaseError,
        errors.PreconditionFailedError,
        errors.BodyTooLargeError,
        errors.HeaderTooLargeError,
        errors.UnsupportedMediaTypeError,
        errors.InvalidNameError,
        errors.InvalidRequestError,
        errors.InvalidAdapterError,
        errors.UnsupportedAdapterError,
        errors.RankTooLargeError,
        errors.TooManyModulesError,
        errors.BusyError,
        errors.SourcesOffError,
        errors.SourceUnknownError,
        errors.SourceRefusedError,
        errors.SourceUnreachableError,
        *STORE_ERRORS,
    ),
)
async def upload_set(
    request: Request,
    context: ContextDep,
    name: SetName,
    options: UploadOptions,
) -> Response:
    """Creates or replaces the set atomically. An adapter that cannot be applied exactly is refused
    with the reason. The parts may also be named after the files they contain. JSON names an adapter
    in an origin of the operator's instead, which the service pulls; that needs the scope `pull`.
    """
    context.store.check_name(name)
    if media_type(request) == Form.JSON:
        return await _report(context, await _pull(request, context, name, options))
    with (
        Place(context.long) as place,
        context.store.new_file() as file,
        Reservation(context.spill) as reserved,
        Reservation(context.memory) as memory,
    ):
        upload = Upload(file, context.limits.max_header_bytes)
        limit = context.limits.max_upload_bytes
        gguf = WholeUpload(file)
        config = await receive_adapter(request, upload, gguf, limit, reserved, place)
        check = precondition(request)
        if config is None:
            imported = await context.long.run(
                gguf_lora.import_gguf,
                context.store,
                context.bases,
                name,
                gguf,
                memory.add,
                check,
                options,
            )
        else:
            imported = await context.long.run(
                sets.import_adapter, context.store, name, config, upload, check, options
            )
    return await _report(context, imported)


async def _pull(
    request: Request, context: Context, name: str, options: UploadOptions
) -> sets.Imported:
    """Pull the adapter that the body names."""
    check_scope(context.store.key, "pull")
    with Place(context.long) as place:
        wanted = await read_model(request, schemas.PullSet, place)
        return await context.long.run(
            pull_set,
            context.store,
            context.origins,
            name,
            wanted.source,
            precondition(request),
            options,
        )


async def _report(context: Context, imported: sets.Imported) -> Response:
    stored, status = imported.stored, 201 if imported.created else 200
    return await json_response(
        context,
        partial(schemas.ImportReport.of, imported),
        stored.record.adapter_count,
        set_headers(context, stored, status),
        status,
    )


@router.patch(
    "/v1/sets/{set}",
    summary="Change the name of a set's base model",
    response_model=schemas.SetInfo,
    openapi_extra=request_body(schemas.PatchSet),
    responses=sends(200, "ETag")
    | problems(
        *CHANGE_ERRORS,
        errors.SetNotFoundError,
        errors.PreconditionFailedError,
    ),
)
async def change_set(request: Request, context: ContextDep, name: SetName) -> Response:
    """The weights stay; the set gets its next version, and its exported configuration the name."""
    with Place(context.long) as place:
        wanted = await read_model(request, schemas.PatchSet, place)
        stored = await context.long.run(
            sets.name_base,
            context.store,
            name,
            wanted.base_model_name,
            precondition(request),
        )
    return await _info(context, stored)


@router.delete(
    "/v1/sets/{set}",
    summary="Delete a set",
    status_code=204,
    responses=problems(
        errors.SetNotFoundError, errors.PreconditionFailedError, errors.StoreReadOnlyError
    ),
)
async def delete_set(request: Request, context: ContextDep, name: SetName) -> None:
    """Requests in flight finish with the set as it was when they started."""
    await context.long.run(sets.delete_set, context.store, name, precondition(request))
