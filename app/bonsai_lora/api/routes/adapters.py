"""The adapters of a set."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from bonsai_lora import errors
from bonsai_lora.api import schemas
from bonsai_lora.api.body import body_form, parse_model, read_body
from bonsai_lora.api.conditions import precondition
from bonsai_lora.api.deps import ContextDep, ModuleName, SetName, WantedSet, WantedVersion
from bonsai_lora.api.json_response import json_response
from bonsai_lora.api.openapi import (
    STORE_ERRORS,
    TENSOR_ERRORS,
    VERSION_ERRORS,
    extra_response,
    problems,
    request_body,
)
from bonsai_lora.api.openapi_headers import sends
from bonsai_lora.api.query import FiniteNumber
from bonsai_lora.core.cast import Array
from bonsai_lora.formats import safetensors
from bonsai_lora.service import adapters
from bonsai_lora.service.work import Place
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.validation import as_written
from bonsai_lora.wire import json
from bonsai_lora.wire.media import Form

router = APIRouter(tags=["adapters"])

_PUT_FIELDS = frozenset({"d_in", "d_out", "config", "lora_A", "lora_B", "alpha"})
_NEW_FIELDS = frozenset({"d_in", "d_out", "config"})

_PUT_BODY = request_body(schemas.NewAdapter, Form.BINARY)
_PUT_BODY["requestBody"]["content"][Form.JSON]["schema"] = {
    "anyOf": [
        {"$ref": "#/components/schemas/NewAdapter"},
        {"$ref": "#/components/schemas/SetWeights"},
    ]
}


@router.get(
    "/v1/sets/{set}/adapters",
    summary="List the adapters of a set",
    response_model=schemas.AdapterList,
    responses=sends(200, "ETag") | problems(*VERSION_ERRORS),
)
async def list_adapters(context: ContextDep, stored: WantedSet) -> Response:
    """Adapters are listed in the order in which they were added."""
    adapters = stored.lora_set.registry.adapters

    def describe() -> schemas.AdapterList:
        modules = [schemas.ModuleInfo.of(*item) for item in adapters.items()]
        return schemas.AdapterList(adapters=modules)

    return await json_response(context, describe, len(adapters), {"ETag": stored.record.etag})


@router.get(
    "/v1/sets/{set}/adapters/{module}",
    summary="Show one adapter of a set",
    responses=sends(200, "ETag") | problems(*VERSION_ERRORS, errors.AdapterNotFoundError),
)
async def get_adapter(
    response: Response,
    context: ContextDep,
    name: SetName,
    module: ModuleName,
    version: WantedVersion = None,
) -> schemas.ModuleInfo:
    """Returns the adapter's dimensions, rank, scaling and size, without its weights."""
    stored = await context.open_version(name, version)
    response.headers["ETag"] = stored.record.etag
    return schemas.ModuleInfo.of(module, adapters.get_adapter(stored, module))


@router.put(
    "/v1/sets/{set}/adapters/{module}",
    summary="Add or replace one adapter of a set",
    openapi_extra=_PUT_BODY,
    responses=extra_response(
        201, "created: the set had no adapter for the module", schemas.ModuleInfo, "ETag"
    )
    | sends(200, "ETag")
    | problems(
        *TENSOR_ERRORS,
        *STORE_ERRORS,
        errors.SetNotFoundError,
        errors.InvalidNameError,
        errors.InvalidAdapterError,
        errors.RankTooLargeError,
        errors.TooManyModulesError,
        errors.PreconditionFailedError,
    ),
)
async def put_adapter(
    request: Request,
    response: Response,
    context: ContextDep,
    name: SetName,
    module: ModuleName,
    alpha: Annotated[
        FiniteNumber | None,
        Query(description="alpha of a binary body; default: the set's"),
    ] = None,
) -> schemas.ModuleInfo:
    """Send `d_in` and `d_out` to initialize the adapter (A uniform, B zero), or `lora_A` and
    `lora_B` to set its weights.
    """
    form = body_form(request, (Form.JSON, Form.BINARY))
    await context.opening.run(context.store.read_record, name)
    with Place(context.long) as place:
        limits = context.limits
        limit = limits.max_json_bytes if form is Form.JSON else limits.max_body_bytes
        body = await read_body(request, limit, place)
        check = precondition(request)

        def put() -> tuple[StoredSet, bool]:
            found, own_alpha = _decode(form, body, limits.max_header_bytes)
            if not isinstance(found, schemas.NewAdapter):
                used = alpha if own_alpha is None else own_alpha
                return adapters.put_weights(context.store, name, module, found, used, check)
            return adapters.put_new_adapter(
                context.store,
                context.memory,
                name,
                module,
                found.d_in,
                found.d_out,
                found.config.to_core() if found.config else None,
                check,
            )

        stored, created = await context.long.run(put)
    response.status_code = 201 if created else 200
    response.headers["ETag"] = stored.record.etag
    return schemas.ModuleInfo.of(module, adapters.get_adapter(stored, module))


def _decode(
    form: Form, body: bytes, max_header_bytes: int
) -> tuple[Mapping[str, Array] | schemas.NewAdapter, float | None]:
    """Return weights by name, or the dimensions of an adapter to initialize; and alpha, if sent."""
    if form is Form.BINARY:
        tensors, _ = safetensors.decode(body, limit=max_header_bytes, most=safetensors.FEW_TENSORS)
        return tensors, None
    value = json.decode_object(body, _PUT_FIELDS)
    if not value:
        raise errors.InvalidRequestError(
            "the body is an empty object; send d_in and d_out to initialize the adapter, or "
            "lora_A and lora_B to set its weights"
        )
    if not value.keys() & {"lora_A", "lora_B"}:
        return parse_model(body, schemas.NewAdapter), None
    alpha = _alpha_of(value)
    return {key: json.decode_tensor(one, key) for key, one in value.items()}, alpha


def _alpha_of(value: dict[str, Any]) -> float | None:
    """Remove `alpha` from the weights of an adapter and return it."""
    mixed = sorted(value.keys() & _NEW_FIELDS)
    if mixed:
        raise errors.InvalidRequestError(
            f"{mixed[0]!r} initializes a new adapter, but lora_A and lora_B set its weights; send "
            "one or the other",
            field=mixed[0],
        )
    alpha: float | None = value.pop("alpha", None)
    if alpha is not None and type(alpha) not in (int, float):
        raise errors.InvalidRequestError(
            f"alpha is {as_written(alpha)}; expected a number", field="alpha"
        )
    return alpha


@router.delete(
    "/v1/sets/{set}/adapters/{module}",
    summary="Remove one adapter from a set",
    status_code=204,
    responses=problems(
        errors.SetNotFoundError,
        errors.AdapterNotFoundError,
        errors.PreconditionFailedError,
        *STORE_ERRORS,
    ),
)
async def delete_adapter(
    request: Request, context: ContextDep, name: SetName, module: ModuleName
) -> None:
    """Creates the next version of the set, without this module."""
    check = precondition(request)
    await context.long.run(adapters.delete_adapter, context.store, name, module, check)
