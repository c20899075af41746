"""Turn errors into responses: one table of status codes, one shape (RFC 9457)."""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import isfinite
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from bonsai_lora import errors
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.validation import as_written, expectation

PROBLEM_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
_PASSING = (
    errors.BusyError,
    errors.BaseChangedError,
    errors.RateLimitedError,
    errors.StoreUnreachableError,
)
"""Errors that the same request need not meet again."""
LFS_TYPE = "application/vnd.git-lfs+json"
_LFS_PATH = re.compile(r"/adapters/[^/]+\.git/info/lfs/")
_HUB_PATH = re.compile(rf"/api/|/[^/]+/[^/]+/resolve/|{_LFS_PATH.pattern}")


STATUSES: Mapping[type[BonsaiLoraError], HTTPStatus] = {
    errors.MalformedRequestError: HTTPStatus.BAD_REQUEST,
    errors.MalformedBodyError: HTTPStatus.BAD_REQUEST,
    errors.UnmergeableError: HTTPStatus.FORBIDDEN,
    errors.UnauthenticatedError: HTTPStatus.UNAUTHORIZED,
    errors.ForbiddenError: HTTPStatus.FORBIDDEN,
    errors.NotFoundError: HTTPStatus.NOT_FOUND,
    errors.MethodNotAllowedError: HTTPStatus.METHOD_NOT_ALLOWED,
    errors.NotAcceptableError: HTTPStatus.NOT_ACCEPTABLE,
    errors.SetExistsError: HTTPStatus.CONFLICT,
    errors.AlreadyLoadedError: HTTPStatus.BAD_REQUEST,
    errors.NotFromSourceError: HTTPStatus.CONFLICT,
    errors.PreconditionFailedError: HTTPStatus.PRECONDITION_FAILED,
    errors.TooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.MisdirectedRequestError: HTTPStatus.MISDIRECTED_REQUEST,
    errors.RateLimitedError: HTTPStatus.TOO_MANY_REQUESTS,
    errors.HeadTooLargeError: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.UnsupportedMediaTypeError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.RangeNotSatisfiableError: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    errors.InvalidError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.BusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.ShuttingDownError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.JobInterruptedError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StalledError: HTTPStatus.REQUEST_TIMEOUT,
    errors.BaseChangedError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.SourceUnreachableError: HTTPStatus.BAD_GATEWAY,
    errors.StoreUnreachableError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StoreReadOnlyError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.NewerFormatError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.QuotaExceededError: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.MemoryBudgetError: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.StoreFullError: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.UnsupportedFeatureError: HTTPStatus.NOT_IMPLEMENTED,
    errors.InternalError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""Status by error class; a class without an entry has that of its nearest ancestor."""


def status_of(kind: type[BonsaiLoraError]) -> HTTPStatus:
    """Return the status of an error class or of its nearest ancestor in STATUSES."""
    return next(STATUSES[parent] for parent in kind.__mro__ if parent in STATUSES)


def problem_response(
    error: BonsaiLoraError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the response for a refused request."""
    scope["problem"] = error  # for the log
    status = status_of(type(error))
    body: dict[str, Any]
    if is_oip(scope["path"]):
        status = status if status in _OIP_STATUSES else HTTPStatus.BAD_REQUEST
        media_type, body = "application/json", _oip_body(error)
    elif _LFS_PATH.match(scope["path"]):
        body = {"message": error.detail, "request_id": scope.get("request_id")}
        media_type = LFS_TYPE
    else:
        media_type, body = PROBLEM_TYPE, _problem_body(error, status, scope)
    more = {**_headers_of(error, scope), **(headers or {})}
    # Unlike orjson, the standard library writes huge integers and lone surrogates, which may occur.
    content = json.dumps(_shortened(body), separators=(",", ":"), default=str)
    return Response(content, int(status), more, media_type=media_type)


def _headers_of(error: BonsaiLoraError, scope: Scope) -> dict[str, str]:
    """Return the headers that belong to an error."""
    headers = _hub_headers(error, scope) if _HUB_PATH.match(scope["path"]) else {}
    if isinstance(error, errors.RangeNotSatisfiableError):
        headers["Content-Range"] = f"bytes */{error.values['size_bytes']}"
    if isinstance(error, errors.UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
        if _LFS_PATH.match(scope["path"]):
            headers["LFS-Authenticate"] = 'Basic realm="Git LFS"'
    if isinstance(error, _PASSING):
        headers["Retry-After"] = str(error.values.get("retry_seconds", RETRY_AFTER_SECONDS))
    return headers


def _hub_headers(error: BonsaiLoraError, scope: Scope) -> dict[str, str]:
    """Return what Hub clients read of an error."""
    # With the request id, which huggingface_hub would otherwise put before the message.
    text = f"{error.detail} (request {scope.get('request_id')})".encode("ascii", "replace").decode()
    message = {"X-Error-Message": "".join(one if one.isprintable() else "?" for one in text)[:2000]}
    if isinstance(error, HubError):
        return {"X-Error-Code": error.kind, **message}
    if isinstance(error, errors.UnauthenticatedError):
        return {"X-Error-Code": "RepoNotFound", **message}
    return message


def _problem_body(error: BonsaiLoraError, status: HTTPStatus, scope: Scope) -> dict[str, Any]:
    trace_id = scope.get("trace_id")
    return {
        "type": f"urn:bonsai-lora:problem:{error.code}",
        "title": error.title,
        "status": int(status),
        "detail": error.detail,
        "instance": scope["path"],
        "code": error.code,
        "request_id": scope.get("request_id"),
        **({} if trace_id is None else {"trace_id": trace_id}),
        **error.values,
    }


class HubError(errors.RouteNotFoundError):
    """A 404 with the X-Error-Code that Hub clients read."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def failure_response(scope: Scope) -> Response:
    """Return the response for an unexpected exception."""
    return problem_response(
        errors.InternalError(
            "the service failed to handle the request; look up the request id in its log"
        ),
        scope,
    )


def is_oip(path: str) -> bool:
    """Return whether a path belongs to the Open Inference Protocol, whose errors differ."""
    return path == "/v2" or path.startswith("/v2/")


_OIP_STATUSES = frozenset(
    {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.MISDIRECTED_REQUEST,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.NOT_IMPLEMENTED,
        HTTPStatus.SERVICE_UNAVAILABLE,
    }
)
"""Statuses that Triton uses, and those of keys; every other error is a 400."""


def _oip_body(error: BonsaiLoraError) -> dict[str, str]:
    if isinstance(error, errors.SetNotFoundError):
        return {"error": f"Request for unknown model: '{error.values['set'][:200]}' is not found"}
    return {"error": error.detail}


def _shortened(value: Any) -> Any:
    """Return `value` for an error response: truncated, without numbers that JSON cannot carry."""
    if isinstance(value, dict):
        return {key: _shortened(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(one) for one in value[:64]]
    if isinstance(value, str):
        return value[:1000]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return "a very large integer"
    return None if isinstance(value, float) and not isfinite(value) else value


def install_error_handlers(app: FastAPI, routes: Sequence[Route]) -> None:
    """Make every error response of `app`, including the framework's own, a problem.

    `routes` are all routes of `app`; they determine which methods a path allows.
    """
    app.add_exception_handler(OSError, _on_system_error)

    @app.exception_handler(BonsaiLoraError)
    def on_refusal(request: Request, error: BonsaiLoraError) -> Response:
        return problem_response(error, request.scope)

    @app.exception_handler(Exception)
    def on_fault(request: Request, _: Exception) -> Response:
        return failure_response(request.scope)  # Starlette raises it again, to be logged

    @app.exception_handler(RequestValidationError)
    def on_validation(request: Request, error: RequestValidationError) -> Response:
        return problem_response(validation_problem(error.errors()), request.scope)

    @app.exception_handler(HTTPException)
    def on_framework(request: Request, error: HTTPException) -> Response:
        path, method = request.url.path, request.method
        if error.status_code == HTTPStatus.NOT_FOUND:
            problem: BonsaiLoraError = errors.RouteNotFoundError(
                f"there is no resource at {path!r}; {_remedy(path)}"
            )
            return problem_response(problem, request.scope)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = _allowed_methods(routes, request.scope)
            remedy = f"use {errors.one_of(allowed)}"
            if path == "/v1/sets" and method in ("PUT", "PATCH", "DELETE"):
                remedy = f"name the set: {method} /v1/sets/{{set}}"
            problem = errors.MethodNotAllowedError(
                f"{method} is not allowed at {path!r}; {remedy}",
                got=method,
                expected=allowed,
            )
            return problem_response(problem, request.scope, {"Allow": ", ".join(allowed)})
        return problem_response(
            errors.MalformedRequestError(
                "the request could not be parsed; check its syntax against RFC 9112"
            ),
            request.scope,
        )


def _on_system_error(request: Request, error: Exception) -> Response:
    if not errors.is_out_of_files(error):
        raise error
    return problem_response(errors.TooManyFilesError(), request.scope)


_OF_AN_ENGINE = "send it to an inference engine, as this service generates no text"
_REMEDIES = (
    ("/v1/v1/", "remove one /v1"),
    ("/v1/completions", _OF_AN_ENGINE),
    ("/v1/chat/completions", _OF_AN_ENGINE),
    ("/api/repos/delete", "use DELETE /v1/sets/{set}"),
)
"""What to do about paths that people expect, by how they begin."""
_NO_OWNER = re.compile(r"/api/models/[^/]*(?:$|/(?:preupload|revision|tree|commits?|paths-info)/)")
_OF_REPOSITORIES = "name a repository as BASE/SET, adapters/SET or bases/BASE"


def _remedy(path: str) -> str:
    """Return what to do about a path at which there is nothing."""
    if path.endswith("/"):
        return "remove the last slash"
    for start, remedy in _REMEDIES:
        if path.startswith(start):
            return remedy
    return _OF_REPOSITORIES if _NO_OWNER.match(path) else "see /docs for all paths"


_SHOWN = 3
"""Faults of a request that a text names; its field `errors` has more."""


def validation_problem(found: Any) -> BonsaiLoraError:
    """Return the error for pydantic's list of errors."""
    if found[0]["type"] == "json_invalid":
        reason = found[0]["msg"].removeprefix("Invalid JSON: ")
        fault = f"is not JSON: {reason}" if found[0]["input"] else "is empty"
        return errors.MalformedJsonError(f"the body {fault}; send JSON")
    reasons = [(_field(one), _reason(one)) for one in found[:16]]
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    text = ". ".join(" ".join(one) for one in reasons[:_SHOWN]) + more
    return errors.InvalidRequestError(
        text,
        errors=[{"field": field, "reason": reason} for field, reason in reasons],
    )


def _field(error: Any) -> str:
    parts = [part for part in error["loc"] if part not in ("body", "query", "path")]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".") or "the body"


_PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Fields of this API by the names that PEFT gives them."""


def _reason(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing; add it"
    if error["type"] == "extra_forbidden":
        meant = _PEFT_NAMES.get(str(error["loc"][-1]))
        return f"is PEFT's name for {meant!r}; use that" if meant else "is unknown; remove it"
    return f"is {as_written(error.get('input'))}; {expectation(error)}"


def _allowed_methods(routes: Sequence[Route], scope: Scope) -> list[str]:
    methods: set[str] = set()
    for route in routes:
        if route.matches(scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted(methods)
