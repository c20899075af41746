"""The errors of the service, which the HTTP API returns as problems.

Each class has a stable `code`. HTTP statuses are assigned in `app/bonsai_lora/api/errors.py` only.
An error's text says what is wrong with the value at hand, then what to do.
"""

from typing import Any, ClassVar


def counted(number: int, noun: str) -> str:
    """Return `1 row` or `2 rows` for the noun `row`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class BonsaiLoraError(Exception):
    """Base class: a stable `code`, a text for people, and the values that it is about."""

    code: str = "error"
    """Stable code of the class; an error raised by a client has the service's code."""
    title: ClassVar[str] = "Error"
    """Short name for people; by default the words of `code`."""

    def __init_subclass__(cls) -> None:
        """Set the default title."""
        if "title" not in vars(cls):
            cls.title = cls.code.replace("_", " ").capitalize()

    def __init__(self, detail: str, **values: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.values = values


class TakesLongError(Exception):
    """The work takes longer than where it runs allows; it has to begin again in the long lane.

    Callers never see it.
    """


class JobCancelledError(Exception):
    """Somebody has cancelled the job that raises it. Callers never see it."""


class MalformedRequestError(BonsaiLoraError):
    """The request violates HTTP/1.1 (RFC 9112)."""

    code = "malformed_request"


class MalformedBodyError(BonsaiLoraError):
    """The body cannot be parsed as its Content-Type declares."""

    code = "malformed_body"


class MalformedJsonError(MalformedBodyError):
    """The body is not JSON (RFC 8259)."""

    code = "malformed_json"
    title = "Malformed JSON"


class MalformedMultipartError(MalformedBodyError):
    """The body is not multipart/form-data, or a part is missing, duplicate or unknown."""

    code = "malformed_multipart"
    title = "Malformed multipart form"


class MalformedSafetensorsError(MalformedBodyError):
    """The bytes violate the safetensors format."""

    code = "malformed_safetensors"


class MalformedGgufError(MalformedBodyError):
    """The bytes violate the GGUF format, or a limit of llama.cpp."""

    code = "malformed_gguf"
    title = "Malformed GGUF"


class UnauthenticatedError(BonsaiLoraError):
    """The request carries no key, or one that is unknown or has expired."""

    code = "unauthenticated"


class ForbiddenError(BonsaiLoraError):
    """The caller may not do this."""

    code = "forbidden"


class NameNotYoursError(ForbiddenError):
    """A write to a name that starts with none of the key's prefixes."""

    code = "name_not_yours"


class CrossSiteError(ForbiddenError):
    """A web page of a different site sent a request that may change something."""

    code = "cross_site"


class MisdirectedRequestError(BonsaiLoraError):
    """The request is for a host name that the service does not answer to."""

    code = "misdirected_request"


class RateLimitedError(BonsaiLoraError):
    """The key has used up its requests or rows for now."""

    code = "rate_limited"


class QuotaExceededError(BonsaiLoraError):
    """The sets under the key's prefixes would exceed its quota."""

    code = "quota_exceeded"


class NotFoundError(BonsaiLoraError):
    """The named resource does not exist."""

    code = "not_found"


class SetNotFoundError(NotFoundError):
    """No set has this name."""

    code = "set_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no set named {name!r}; GET /v1/sets lists those that exist", set=name
        )


class AdapterNotFoundError(NotFoundError):
    """The set has no adapter for this module."""

    code = "module_not_found"

    def __init__(self, module: str, set_name: str, known: tuple[str, ...]) -> None:
        shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        super().__init__(
            f"set {set_name!r} has no adapter for module {module!r}; "
            + (f"use one that it has: {shown}" if known else "add one first"),
            set=set_name,
            module=module,
        )


class BaseNotFoundError(NotFoundError):
    """No base checkpoint has this name."""

    code = "base_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no base named {name!r}; add a folder of that name with safetensors files "
            "under the setting bases (GET /v1/bases lists the bases)",
            base=name,
        )


class JobNotFoundError(NotFoundError):
    """The caller has no job of this id."""

    code = "job_not_found"

    def __init__(self, number: str) -> None:
        super().__init__(
            f"there is no job {number[:64]!r}; GET /v1/jobs lists those of the last day",
            job=number[:64],
        )


class FileNotInModelError(NotFoundError):
    """A merged model has no file of this name."""

    code = "file_not_found"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"the model has no file {name[:200]!r}; request one of {', '.join(known[:16])}",
            file=name,
        )


class VersionNotFoundError(NotFoundError):
    """The model has a different version now."""

    code = "version_not_found"


class RegionNotFoundError(NotFoundError):
    """No shared-memory region has this name."""

    code = "region_not_found"


class RouteNotFoundError(NotFoundError):
    """The path does not exist."""


class MethodNotAllowedError(BonsaiLoraError):
    """The path exists, but not with this method."""

    code = "method_not_allowed"


class NotAcceptableError(BonsaiLoraError):
    """The response has no form that the client accepts."""

    code = "not_acceptable"


class SetExistsError(BonsaiLoraError):
    """A set with this name already exists."""

    code = "set_exists"


class PreconditionFailedError(BonsaiLoraError):
    """`If-Match` or `If-None-Match` evaluates to false."""

    code = "precondition_failed"


class TooLargeError(BonsaiLoraError):
    """The request exceeds a limit of the settings."""

    code = "too_large"


class BodyTooLargeError(TooLargeError):
    """The body is longer than the limit, as declared or as received."""

    code = "body_too_large"


class HeaderTooLargeError(TooLargeError):
    """The header of a safetensors or GGUF file is longer than the limit."""

    code = "header_too_large"
    title = "Tensor header too large"


class HeadTooLargeError(TooLargeError):
    """The request head is too long, or has too many lines."""

    code = "head_too_large"
    title = "Request head too large"


class TooManyRowsError(TooLargeError):
    """A batch has more rows than the limit."""

    code = "too_many_rows"


class AnswerTooLargeError(TooLargeError):
    """The response would be longer than the limit."""

    code = "answer_too_large"


class UnsupportedMediaTypeError(BonsaiLoraError):
    """The path does not support the media type or content coding of the body."""

    code = "unsupported_media_type"


class RangeNotSatisfiableError(BonsaiLoraError):
    """The requested range is beyond the end of the file."""

    code = "range_not_satisfiable"


class InvalidError(BonsaiLoraError):
    """The request is well-formed, but its content is invalid."""

    code = "invalid"


class InvalidRequestError(InvalidError):
    """A field, parameter or tensor is missing, unknown or of the wrong type."""

    code = "invalid_request"


class InvalidNameError(InvalidError):
    """The name of a set or module is not valid."""

    code = "invalid_name"


class ShapeMismatchError(InvalidError):
    """An array does not have the shape that the adapter needs."""

    code = "shape_mismatch"


class NonFiniteInputError(InvalidError):
    """An input has NaN, infinity or a number beyond float32."""

    code = "non_finite_input"
    title = "Non-finite input"


class NonFiniteOutputError(InvalidError):
    """A result overflows float32, which JSON cannot carry."""

    code = "non_finite_output"
    title = "Non-finite output"


class RaggedInputError(InvalidError):
    """The rows of a batch have different lengths."""

    code = "ragged_input"


class RankTooLargeError(InvalidError):
    """The rank exceeds the limit of the settings."""

    code = "rank_too_large"


class TooManyModulesError(InvalidError):
    """The set would have more modules than the limit of the settings."""

    code = "too_many_modules"


class DoraNeedsBaseError(InvalidError):
    """A DoRA module's outputs need the base checkpoint and W x, and one is missing."""

    code = "dora_needs_base"
    title = "DoRA needs the base"


class InvalidBaseError(InvalidError):
    """The files of a base are not a readable checkpoint."""

    code = "invalid_base"


class InvalidAdapterError(InvalidError):
    """The files of an adapter contradict each other or hold invalid values."""

    code = "invalid_adapter"


class UnsupportedAdapterError(InvalidError):
    """The adapter is of a kind that cannot be applied exactly."""

    code = "unsupported_adapter"


class UnmergeableError(InvalidError):
    """The set does not fit the base, or the base cannot be a checkpoint.

    Raised by Hub routes, whose clients show the text.
    """

    code = "unmergeable"


class UnsupportedGgufError(InvalidError):
    """A GGUF file has a type or a transformation that cannot be read or written exactly."""

    code = "unsupported_gguf"
    title = "Unsupported GGUF"


class BusyError(BonsaiLoraError):
    """Too many requests are in progress; this one was not started."""

    code = "busy"


class ShuttingDownError(BonsaiLoraError):
    """The service is about to stop; a balancer should send it nothing more."""

    code = "shutting_down"


class JobInterruptedError(BonsaiLoraError):
    """The process that ran a job has ended, or it was cancelled; never the answer to a request."""

    code = "job_interrupted"

    def __init__(self, what: str = "the process that ran the job has ended") -> None:
        super().__init__(f"{what}, so it stored nothing; send its request again")


class StalledError(BonsaiLoraError):
    """The client stopped sending or reading for longer than the stall timeout."""

    code = "stalled"


class BaseChangedError(BonsaiLoraError):
    """A file of a base was overwritten or truncated while it was read."""

    code = "base_changed"


class MemoryBudgetError(BonsaiLoraError):
    """All sets together, or one request, would take more memory than allowed."""

    code = "memory_budget_exceeded"
    title = "Over the memory budget"


class StoreFullError(BonsaiLoraError):
    """The disk under the store is full."""

    code = "store_full"


class StoreReadOnlyError(BonsaiLoraError):
    """The store is read-only."""

    code = "store_read_only"
    title = "Store read-only"


class NewerFormatError(BonsaiLoraError):
    """A newer release wrote the set; its file is left untouched."""

    code = "newer_format"

    def __init__(self, name: str, written: int, known: int) -> None:
        super().__init__(
            f"set {name!r} has record format {written} of a newer release, but this release reads "
            f"format {known}; upgrade the service to use, change or delete the set",
            set=name,
            got=written,
            expected=known,
        )


class UnsupportedFeatureError(BonsaiLoraError):
    """The feature is not supported, or not enabled."""

    code = "unsupported_feature"


class InternalError(BonsaiLoraError):
    """The service failed; its log has the cause under the request id."""

    code = "internal_error"
