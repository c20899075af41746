"""The errors of the service, which the HTTP API returns as problems.

Each class has a stable `code`. HTTP statuses are assigned in `app/bonsai_lora/api/errors.py` only.
An error's text says what is wrong with the value at hand, then what to do.
"""

import errno
from collections.abc import Sequence
from typing import Any, ClassVar


def counted(number: int, noun: str) -> str:
    """Return `1 row` or `2 rows` for the noun `row`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_of(names: Sequence[str]) -> str:
    """Return `a`, or `one of a, b`."""
    return ", ".join(names) if len(names) == 1 else f"one of {', '.join(names)}"


BY_CODE: dict[str, type["BonsaiLoraError"]] = {}
"""Classes by code; of those that share one, the first, which is the parent."""


class BonsaiLoraError(Exception):
    """Base class: a stable `code`, a text for people, and the values that it is about."""

    code: str = "error"
    """Stable code of the class; an error raised by a client has the service's code."""
    title: ClassVar[str] = "Error"
    """Short name for people; by default the words of `code`."""

    def __init_subclass__(cls, code: str | None = None, title: str | None = None) -> None:
        """Set the code, by default the parent's, and the title."""
        cls.code = code or cls.code
        cls.title = title or cls.code.replace("_", " ").capitalize()
        BY_CODE.setdefault(cls.code, cls)

    def __init__(self, detail: str, **values: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.values = values


class ChangedMeanwhileError(Exception):
    """A different process has changed the set; the change is made again, on the new version.

    Callers never see it.
    """


class TakesLongError(Exception):
    """The work takes longer than where it runs allows; it has to begin again in the long lane.

    Callers never see it.
    """


class JobCancelledError(Exception):
    """Somebody has cancelled the job that raises it. Callers never see it."""


class MalformedRequestError(BonsaiLoraError, code="malformed_request"):
    """The request violates HTTP/1.1 (RFC 9112)."""


class MalformedBodyError(BonsaiLoraError, code="malformed_body"):
    """The body cannot be parsed as its Content-Type declares."""


class MalformedJsonError(MalformedBodyError, code="malformed_json", title="Malformed JSON"):
    """The body is not JSON (RFC 8259)."""


class MalformedMultipartError(
    MalformedBodyError, code="malformed_multipart", title="Malformed multipart form"
):
    """The body is not multipart/form-data, or a part is missing, duplicate or unknown."""


class MalformedSafetensorsError(MalformedBodyError, code="malformed_safetensors"):
    """The bytes violate the safetensors format."""


class MalformedGgufError(MalformedBodyError, code="malformed_gguf", title="Malformed GGUF"):
    """The bytes violate the GGUF format, or a limit of llama.cpp."""


class UnauthenticatedError(BonsaiLoraError, code="unauthenticated"):
    """The request carries no key, or one that is unknown or has expired."""


class ForbiddenError(BonsaiLoraError, code="forbidden"):
    """The caller may not do this."""


class NameNotYoursError(ForbiddenError, code="name_not_yours"):
    """A write to a name that starts with none of the key's prefixes."""


class LinkRefusedError(ForbiddenError, code="link_refused"):
    """A link to upload to has expired, or the service did not sign it."""


class CrossSiteError(ForbiddenError, code="cross_site"):
    """A web page of a different site sent a request that may change something."""


class MisdirectedRequestError(BonsaiLoraError, code="misdirected_request"):
    """The request is for a host name that the service does not answer to."""


class RateLimitedError(BonsaiLoraError, code="rate_limited"):
    """The key has used up its requests or rows for now."""


class QuotaExceededError(BonsaiLoraError, code="quota_exceeded"):
    """The sets under the key's prefixes would exceed its quota."""


class NotFoundError(BonsaiLoraError, code="not_found"):
    """The named resource does not exist."""


class SetNotFoundError(NotFoundError, code="set_not_found"):
    """No set has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no set named {name!r}; GET /v1/sets lists those that exist", set=name
        )


class AdapterNotFoundError(NotFoundError, code="module_not_found"):
    """The set has no adapter for this module."""

    def __init__(self, module: str, set_name: str, known: tuple[str, ...]) -> None:
        shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        super().__init__(
            f"set {set_name!r} has no adapter for module {module!r}; "
            + (f"use one that it has: {shown}" if known else "add one first"),
            set=set_name,
            module=module,
        )


class BaseNotFoundError(NotFoundError, code="base_not_found"):
    """No base checkpoint has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no base named {name!r}; add a folder of that name with safetensors files, "
            "or a GGUF file, to the folder that --bases names (GET /v1/bases lists the bases)",
            base=name,
        )


class JobNotFoundError(NotFoundError, code="job_not_found"):
    """The caller has no job of this id."""

    def __init__(self, number: str) -> None:
        super().__init__(
            f"there is no job {number[:64]!r}; GET /v1/jobs lists those of the last day",
            job=number[:64],
        )


class FileNotInModelError(NotFoundError, code="file_not_found"):
    """A merged model has no file of this name."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"the model has no file {name[:200]!r}; request one of {', '.join(known[:16])}",
            file=name,
        )


class VersionNotFoundError(NotFoundError, code="version_not_found"):
    """The model has a different version now."""


class RegionNotFoundError(NotFoundError, code="region_not_found"):
    """No shared-memory region has this name."""


class AlreadyLoadedError(BonsaiLoraError, code="already_loaded"):
    """A load, in the words of an engine, for a name that is taken."""


class NotFromSourceError(BonsaiLoraError, code="not_from_source"):
    """An unload, in the words of an engine, of a set that was not pulled."""


class SourcesOffError(NotFoundError, code="sources_off"):
    """The operator named no origins to pull sets from."""


class SourceUnknownError(NotFoundError, code="source_unknown"):
    """The reference is in no origin that the operator named, or not in a part that it allows."""


class RouteNotFoundError(NotFoundError):
    """The path does not exist."""


class MethodNotAllowedError(BonsaiLoraError, code="method_not_allowed"):
    """The path exists, but not with this method."""


class NotAcceptableError(BonsaiLoraError, code="not_acceptable"):
    """The response has no form that the client accepts."""


class SetExistsError(BonsaiLoraError, code="set_exists"):
    """A set with this name already exists."""


class PreconditionFailedError(BonsaiLoraError, code="precondition_failed"):
    """`If-Match` or `If-None-Match` evaluates to false."""


class TooLargeError(BonsaiLoraError, code="too_large"):
    """The request exceeds a limit of the settings."""


class BodyTooLargeError(TooLargeError, code="body_too_large"):
    """The body is longer than the limit, as declared or as received."""


class HeaderTooLargeError(TooLargeError, code="header_too_large", title="Tensor header too large"):
    """The header of a safetensors or GGUF file is longer than the limit."""


class HeadTooLargeError(TooLargeError, code="head_too_large", title="Request head too large"):
    """The request head is too long, or has too many lines."""


class TooManyRowsError(TooLargeError, code="too_many_rows"):
    """A batch has more rows than the limit."""


class AnswerTooLargeError(TooLargeError, code="answer_too_large"):
    """The response would be longer than the limit."""


class UnsupportedMediaTypeError(BonsaiLoraError, code="unsupported_media_type"):
    """The path does not support the media type or content coding of the body."""


class RangeNotSatisfiableError(BonsaiLoraError, code="range_not_satisfiable"):
    """The requested range is beyond the end of the file."""


class InvalidError(BonsaiLoraError, code="invalid"):
    """The request is well-formed, but its content is invalid."""


class InvalidRequestError(InvalidError, code="invalid_request"):
    """A field, parameter or tensor is missing, unknown or of the wrong type."""


class InvalidNameError(InvalidError, code="invalid_name"):
    """The name of a set or module is not valid."""


class ShapeMismatchError(InvalidError, code="shape_mismatch"):
    """An array does not have the shape that the adapter needs."""


class NonFiniteInputError(InvalidError, code="non_finite_input", title="Non-finite input"):
    """An input has NaN, infinity or a number beyond float32."""


class NonFiniteOutputError(InvalidError, code="non_finite_output", title="Non-finite output"):
    """A result overflows float32, which JSON cannot carry."""


class RaggedInputError(InvalidError, code="ragged_input"):
    """The rows of a batch have different lengths."""


class RankTooLargeError(InvalidError, code="rank_too_large"):
    """The rank exceeds the limit of the settings."""


class TooManyModulesError(InvalidError, code="too_many_modules"):
    """The set would have more modules than the limit of the settings."""


class DoraNeedsBaseError(InvalidError, code="dora_needs_base", title="DoRA needs the base"):
    """A DoRA module's outputs need the base checkpoint and W x, and one is missing."""


class InvalidBaseError(InvalidError, code="invalid_base"):
    """The files of a base are not a readable checkpoint."""


class InvalidAdapterError(InvalidError, code="invalid_adapter"):
    """The files of an adapter contradict each other or hold invalid values."""


class UnsupportedAdapterError(InvalidError, code="unsupported_adapter"):
    """The adapter is of a kind that cannot be applied exactly."""


class SourceRefusedError(InvalidError, code="source_refused"):
    """The origin has no such file, or answers in a way that is not allowed."""


class UnmergeableError(InvalidError, code="unmergeable"):
    """The set does not fit the base, or the base cannot be a checkpoint.

    Raised by Hub routes, whose clients show the text.
    """


class UnsupportedGgufError(InvalidError, code="unsupported_gguf", title="Unsupported GGUF"):
    """A GGUF file has a type or a transformation that cannot be read or written exactly."""


class BusyError(BonsaiLoraError, code="busy"):
    """Too many requests are in progress; this one was not started."""


class TooManyFilesError(BusyError):
    """No file descriptor is left."""

    def __init__(self) -> None:
        super().__init__("too many files are open; retry in a second, or raise the limit of files")


def is_out_of_files(error: Exception) -> bool:
    """Return whether `error` says that no file descriptor is left."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


class StoreUnreachableError(BonsaiLoraError, code="store_unreachable"):
    """The bucket does not answer, and what is asked needs it."""


class ShuttingDownError(BonsaiLoraError, code="shutting_down"):
    """The service is about to stop; a balancer should send it nothing more."""


class JobInterruptedError(BonsaiLoraError, code="job_interrupted"):
    """The process that ran a job has ended, or it was cancelled; never the answer to a request."""

    def __init__(self, what: str = "the process that ran the job has ended") -> None:
        super().__init__(f"{what}, so it stored nothing; send its request again")


class StalledError(BonsaiLoraError, code="stalled"):
    """The client stopped sending or reading for longer than the stall timeout."""


class SourceUnreachableError(BonsaiLoraError, code="source_unreachable"):
    """The origin does not answer, or too slowly."""


class BaseChangedError(BonsaiLoraError, code="base_changed"):
    """A file of a base was overwritten or truncated while it was read."""


class MemoryBudgetError(
    BonsaiLoraError, code="memory_budget_exceeded", title="Over the memory budget"
):
    """All sets together, or one request, would take more memory than allowed."""


class StoreFullError(BonsaiLoraError, code="store_full"):
    """The disk under the store is full."""


class StoreReadOnlyError(BonsaiLoraError, code="store_read_only", title="Store read-only"):
    """The store is read-only."""


class NewerFormatError(BonsaiLoraError, code="newer_format"):
    """A newer release wrote the set; its file is left untouched."""

    def __init__(self, name: str, written: int, known: int) -> None:
        super().__init__(
            f"set {name!r} has record format {written} of a newer release, but this release reads "
            f"format {known}; upgrade the service to use, change or delete the set",
            set=name,
            got=written,
            expected=known,
        )


class UnsupportedFeatureError(BonsaiLoraError, code="unsupported_feature"):
    """The feature is not supported, or not enabled."""


class InternalError(BonsaiLoraError, code="internal_error"):
    """The service failed; its log has the cause under the request id."""
