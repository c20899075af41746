"""Helpers that describe routes in the OpenAPI document."""

from collections import defaultdict
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bonsai_lora import errors
from bonsai_lora.api import job_schemas, lab_schemas, oip_schemas, schemas, tensor_schemas
from bonsai_lora.api.errors import PROBLEM_TYPE, is_oip, status_of
from bonsai_lora.api.openapi_headers import describe_headers, references
from bonsai_lora.api.openapi_schemas import REFERENCE, reachable, refine_schemas
from bonsai_lora.api.scopes import OPEN, scope_of
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.wire.media import Form

_BINARY = {"type": "string", "format": "binary"}

Kinds = tuple[type[BonsaiLoraError], ...]

ANY_ERRORS: Kinds = (errors.InternalError,)
KEY_ERRORS: Kinds = (
    errors.UnauthenticatedError,
    errors.ForbiddenError,
    errors.RateLimitedError,
)
BODY_ERRORS: Kinds = (
    errors.MalformedJsonError,
    errors.BodyTooLargeError,
    errors.UnsupportedMediaTypeError,
    errors.InvalidRequestError,
    errors.BusyError,
)
TENSOR_ERRORS: Kinds = (
    *BODY_ERRORS,
    errors.MalformedSafetensorsError,
    errors.HeaderTooLargeError,
    errors.NotAcceptableError,
    errors.ShapeMismatchError,
    errors.NonFiniteInputError,
    errors.RaggedInputError,
)
APPLY_ERRORS: Kinds = (
    *TENSOR_ERRORS,
    errors.SetNotFoundError,
    errors.AdapterNotFoundError,
    errors.TooManyRowsError,
    errors.AnswerTooLargeError,
    errors.NonFiniteOutputError,
    errors.DoraNeedsBaseError,
    errors.UnsupportedAdapterError,
)
STORE_ERRORS: Kinds = (
    errors.QuotaExceededError,
    errors.MemoryBudgetError,
    errors.StoreFullError,
    errors.StoreReadOnlyError,
    errors.NewerFormatError,
    errors.StoreUnreachableError,
)
CHANGE_ERRORS: Kinds = (*BODY_ERRORS, *STORE_ERRORS)
"""Of a change whose request is JSON."""
STORED_ERRORS: Kinds = (errors.NewerFormatError, errors.StoreUnreachableError)
VERSION_ERRORS: Kinds = (
    errors.SetNotFoundError,
    errors.VersionNotFoundError,
    errors.InvalidRequestError,
)
"""Of a read of a set, or of one version of it."""

Responses = dict[int | str, dict[str, Any]]


def extra_response(
    status: int, description: str, model: type[BaseModel] | None = None, *headers: str
) -> Responses:
    """Return an additional response of a route, with the body `model` if given."""
    more = {} if model is None else {"model": model}
    return {status: {"description": description, **more, "headers": references(headers)}}


def problems(*kinds: type[BonsaiLoraError]) -> Responses:
    """Return the `responses` of a route that raises these errors."""
    by_status: dict[int, list[str]] = defaultdict(list)
    # Any route that names a set may find one that a newer release wrote, or a bucket that is away.
    more = STORED_ERRORS if errors.SetNotFoundError in kinds else ()
    for kind in dict.fromkeys((*kinds, *more, *ANY_ERRORS)):
        by_status[int(status_of(kind))].append(kind.code)
    return {
        status: {
            "description": " or ".join(f"`{code}`" for code in codes),
            "content": {PROBLEM_TYPE: {"schema": _ref(schemas.Problem)}},
        }
        for status, codes in sorted(by_status.items())
    }


def request_body(
    model: type[BaseModel],
    *forms: Form,
    example: dict[str, Any] | None = None,
    required: bool = True,
) -> dict[str, Any]:
    """Return the `openapi_extra` of a route whose body is the JSON of `model`, or in `forms`."""
    content = _content(model, forms)
    if example is not None:
        content[Form.JSON]["example"] = example
    return {"requestBody": {"required": required, "content": content}}


def tensor_responses(model: type[BaseModel], *forms: Form) -> Responses:
    """Return the `responses` of a route that returns the JSON of `model`, or binary."""
    description = "the result, computed in float32"
    return {200: {"description": description, "content": _content(model, forms)}}


def _content(model: type[BaseModel], forms: Iterable[Form]) -> dict[str, Any]:
    """Return the content of a body that is the JSON of `model`, or in `forms`."""
    binary: dict[str, Any] = {form: {"schema": _BINARY} for form in forms}
    return {Form.JSON: {"schema": _ref(model)}, **binary}


def oip_errors(*statuses: int) -> Responses:
    """Return the error `responses` of an Open Inference Protocol route."""
    content = {Form.JSON: {"schema": _ref(oip_schemas.OipError)}}
    words = {status: HTTPStatus(status).phrase for status in sorted({*statuses, 500})}
    return {status: {"description": word, "content": content} for status, word in words.items()}


def empty_responses() -> Responses:
    """Return the `responses` of a route whose response has no body."""
    return {200: {"description": "done; the response has no body", "content": {}}}


def file_responses(media_type: str, *headers: str) -> Responses:
    """Return the `responses` of a route that serves a file and its byte ranges, with `headers`."""
    schema = {"type": "object"} if media_type == Form.JSON else _BINARY
    content, sent = {media_type: {"schema": schema}}, references(headers)
    return {
        200: {"description": "the whole file", "content": content, "headers": sent},
        206: {
            "headers": sent,
            "description": "the requested byte ranges",
            "content": {**content, "multipart/byteranges": {"schema": _BINARY}},
        },
        304: {
            "headers": sent,
            "description": "not modified: If-None-Match names the current ETag",
        },
    }


def install_openapi(app: FastAPI, root_path: str = "") -> None:
    """Make `app.openapi()` include the models that only hand-written bodies refer to, and keys."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                license_info=app.license_info,
                routes=app.routes,
                tags=app.openapi_tags,
                servers=[{"url": root_path}] if root_path else None,
            )
            _drop_unused_validation_errors(document)
            _add_security(document)
            _add_models(document)
            refine_schemas(document)
            describe_headers(document)
            document.setdefault("servers", [{"url": "/"}])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_security(document: dict[str, Any]) -> None:
    """Declare the key that all but open operations need, and the refusals that come with it.

    A service without keys takes the same calls without one.
    """
    document.setdefault("components", {})["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "a key of `bonsai-lora keys new`; also taken as the password of Basic",
        }
    }
    document["security"] = [{"key": []}]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            need = scope_of(method.upper(), path)
            if need == OPEN:
                operation["security"] = []
                continue
            refusals = KEY_ERRORS + ((errors.NameNotYoursError,) if need == "write" else ())
            more = oip_errors(401, 403, 429) if is_oip(path) else problems(*refusals)
            known = operation["responses"]
            known |= {str(status): one for status, one in more.items() if str(status) not in known}


def _drop_unused_validation_errors(document: dict[str, Any]) -> None:
    """Remove the 422 that FastAPI adds to routes which cannot raise a validation error."""
    for item in document["paths"].values():
        for operation in item.values():
            answer = operation["responses"].get("422", {})
            if PROBLEM_TYPE not in answer.get("content", {}):
                operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _add_models(document: dict[str, Any]) -> None:
    """Add the schemas of all references that the document does not resolve yet."""
    known = document.setdefault("components", {}).setdefault("schemas", {})
    models = [
        one
        for module in (schemas, tensor_schemas, oip_schemas, lab_schemas, job_schemas)
        for one in vars(module).values()
        if isinstance(one, type)
        and issubclass(one, BaseModel)
        and one.__module__ == module.__name__
    ]
    kinds = (schemas.RequestModel, oip_schemas.LenientModel)
    requests = {one for one in models if issubclass(one, kinds)}
    pairs = [(one, "validation" if one in requests else "serialization") for one in models]
    _, definitions = models_json_schema(pairs, ref_template=f"{REFERENCE}{{model}}")  # type: ignore[arg-type]
    found = definitions["$defs"] | known
    known |= {name: found[name] for name in sorted(reachable(document, found)) if name not in known}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"{REFERENCE}{model.__name__}"}
