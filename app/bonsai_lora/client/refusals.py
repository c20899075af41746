"""From a refusal on the wire to the error that it stands for."""

from collections.abc import Mapping
from typing import Any

import httpx

from bonsai_lora import errors
from bonsai_lora.errors import BonsaiLoraError

_BY_STATUS: Mapping[int, type[BonsaiLoraError]] = {
    400: errors.MalformedBodyError,
    401: errors.UnauthenticatedError,
    403: errors.ForbiddenError,
    404: errors.NotFoundError,
    405: errors.MethodNotAllowedError,
    406: errors.NotAcceptableError,
    408: errors.StalledError,
    412: errors.PreconditionFailedError,
    413: errors.TooLargeError,
    415: errors.UnsupportedMediaTypeError,
    416: errors.RangeNotSatisfiableError,
    421: errors.MisdirectedRequestError,
    422: errors.InvalidError,
    429: errors.RateLimitedError,
    431: errors.HeadTooLargeError,
    500: errors.InternalError,
    501: errors.UnsupportedFeatureError,
    503: errors.BusyError,
}
"""Class of an error whose code this release does not know; BonsaiLoraError for other statuses."""

_STANDARD = frozenset({"type", "title", "detail", "instance", "code"})
"""Members of a problem (RFC 9457) that are not values."""


def refusal_of(answer: httpx.Response) -> BonsaiLoraError:
    """Return the error of an answer that is not a success; its body must have been read.

    The class follows from `code`, from the status for an unknown code. `values` has the values of
    the problem, `status` and, where given, `request_id`.
    """
    try:
        body = answer.json()
    except ValueError:
        body = None
    status = answer.status_code
    if isinstance(body, dict) and isinstance(body.get("code"), str):
        return error_of({"status": status, **body}, _BY_STATUS.get(status, BonsaiLoraError))
    kind = _BY_STATUS.get(status, BonsaiLoraError)
    if isinstance(body, dict) and isinstance(body.get("error"), str):  # Open Inference Protocol
        kind = errors.InvalidError if status == httpx.codes.BAD_REQUEST else kind
        return _made(kind, kind.code, body["error"], {"status": status})
    phrase = f"the service answered {status} {answer.reason_phrase}".rstrip()
    return _made(kind, f"http_{status}", phrase, {"status": status})


def error_of(
    problem: Mapping[str, Any], unknown: type[BonsaiLoraError] = BonsaiLoraError
) -> BonsaiLoraError:
    """Return the error that a problem with a `code` stands for; `unknown` for an unknown code."""
    kind = errors.BY_CODE.get(problem["code"]) or unknown
    values = {name: value for name, value in problem.items() if name not in _STANDARD}
    return _made(kind, problem["code"], str(problem.get("detail")), values)


def _made(
    kind: type[BonsaiLoraError], code: str, detail: str, values: dict[str, Any]
) -> BonsaiLoraError:
    error = kind.__new__(kind)  # constructors word the detail, which the service has done
    BonsaiLoraError.__init__(error, detail)
    error.code, error.values = code, values
    return error
