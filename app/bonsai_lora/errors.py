"""Every error that a caller can cause, as one tree.

    BonsaiLoraError
    ├── MalformedBodyError                  the bytes cannot be read at all
    │   ├── MalformedJsonError
    │   ├── MalformedMultipartError
    │   └── MalformedSafetensorsError
    ├── NotFoundError
    │   ├── SetNotFoundError
    │   ├── AdapterNotFoundError
    │   ├── BaseNotFoundError
    │   ├── FileNotInModelError
    │   ├── VersionNotFoundError
    │   ├── RegionNotFoundError
    │   └── RouteNotFoundError
    ├── MethodNotAllowedError
    ├── NotAcceptableError
    ├── SetExistsError
    ├── PreconditionFailedError
    ├── TooLargeError                       over a limit of the settings
    │   ├── BodyTooLargeError
    │   ├── HeaderTooLargeError
    │   ├── HeadTooLargeError
    │   ├── TooManyRowsError
    │   └── AnswerTooLargeError
    ├── UnsupportedMediaTypeError
    ├── RangeNotSatisfiableError
    ├── InvalidError                        well-formed, but wrong
    │   ├── InvalidRequestError
    │   ├── InvalidNameError
    │   ├── ShapeMismatchError
    │   ├── NonFiniteInputError
    │   ├── NonFiniteOutputError
    │   ├── RaggedInputError
    │   ├── RankTooLargeError
    │   ├── DoraNeedsBaseError
    │   ├── InvalidBaseError
    │   ├── InvalidAdapterError
    │   └── UnsupportedAdapterError
    ├── BusyError                           try again later
    ├── StalledError                        a client takes nothing; the answer is broken off
    ├── BaseChangedError                    a base was overwritten while it was read
    ├── MemoryBudgetError
    ├── StoreFullError
    ├── StoreReadOnlyError
    ├── NewerFormatError                    a newer release wrote the set
    ├── UnsupportedFeatureError             not here, or not switched on
    └── InternalError                       ours, not the caller's

Each class has a stable `code`. Nothing here knows an HTTP status: the one table from
class to status is `app/bonsai_lora/api/errors.py`.
"""

from typing import Any, ClassVar


class BonsaiLoraError(Exception):
    """An expected refusal: a stable code, a sentence for a person, and the values it is about."""

    code: str = "error"
    """Of the class; the service's, where a client raises it for an answer."""
    title: ClassVar[str] = "Error"

    def __init__(self, detail: str, **values: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.values = values


class MalformedBodyError(BonsaiLoraError):
    """The body cannot be read in the form that it claims to have."""

    code = "malformed_body"
    title = "Malformed body"


class MalformedJsonError(MalformedBodyError):
    """The body is not JSON (RFC 8259)."""

    code = "malformed_json"
    title = "Malformed JSON"


class MalformedMultipartError(MalformedBodyError):
    """The body is not multipart/form-data, or a part is missing, doubled or unknown."""

    code = "malformed_multipart"
    title = "Malformed multipart form"


class MalformedSafetensorsError(MalformedBodyError):
    """The bytes break a rule of the safetensors format."""

    code = "malformed_safetensors"
    title = "Malformed safetensors"


class NotFoundError(BonsaiLoraError):
    """The thing named does not exist."""

    code = "not_found"
    title = "Not found"


class SetNotFoundError(NotFoundError):
    """No set has this name."""

    code = "set_not_found"
    title = "Set not found"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no set named {name!r}; GET /v1/sets lists those that exist", set=name
        )


class AdapterNotFoundError(NotFoundError):
    """The set has no adapter for this module."""

    code = "module_not_found"
    title = "Module not found"

    def __init__(self, module: str, set_name: str, known: tuple[str, ...]) -> None:
        shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        super().__init__(
            f"set {set_name!r} has no adapter for module {module!r}; "
            + (f"it has {len(known)}: {shown}" if known else "it is empty"),
            set=set_name,
            module=module,
        )


class BaseNotFoundError(NotFoundError):
    """No base checkpoint has this name."""

    code = "base_not_found"
    title = "Base not found"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no base named {name!r}: no folder of that name with safetensors files lies "
            "under the setting bases; GET /v1/bases lists those that do",
            base=name,
        )


class FileNotInModelError(NotFoundError):
    """A merged model has no file of this name."""

    code = "file_not_found"
    title = "File not found"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"there is no file {name[:200]!r}; the model has {', '.join(known[:16])}", file=name
        )


class VersionNotFoundError(NotFoundError):
    """A model has another version now."""

    code = "version_not_found"
    title = "Version not found"


class RegionNotFoundError(NotFoundError):
    """No shared-memory region has this name."""

    code = "region_not_found"
    title = "Region not found"


class RouteNotFoundError(NotFoundError):
    """Nothing is served at this path."""


class MethodNotAllowedError(BonsaiLoraError):
    """The path exists, but not with this method."""

    code = "method_not_allowed"
    title = "Method not allowed"


class NotAcceptableError(BonsaiLoraError):
    """No form that the caller accepts can be given here."""

    code = "not_acceptable"
    title = "Not acceptable"


class SetExistsError(BonsaiLoraError):
    """A set of this name exists already."""

    code = "set_exists"
    title = "Set exists"


class PreconditionFailedError(BonsaiLoraError):
    """`If-Match` or `If-None-Match` does not hold."""

    code = "precondition_failed"
    title = "Precondition failed"


class TooLargeError(BonsaiLoraError):
    """More than a limit of the settings allows."""

    code = "too_large"
    title = "Too large"


class BodyTooLargeError(TooLargeError):
    """The body is longer than the limit, as declared or as received."""

    code = "body_too_large"
    title = "Body too large"


class HeaderTooLargeError(TooLargeError):
    """A safetensors header is longer than the limit."""

    code = "header_too_large"
    title = "Tensor header too large"


class HeadTooLargeError(TooLargeError):
    """The head of a request is too long, or has too many lines."""

    code = "head_too_large"
    title = "Request head too large"


class TooManyRowsError(TooLargeError):
    """A batch has more rows than the limit."""

    code = "too_many_rows"
    title = "Too many rows"


class AnswerTooLargeError(TooLargeError):
    """The answer would be longer than the limit."""

    code = "answer_too_large"
    title = "Answer too large"


class UnsupportedMediaTypeError(BonsaiLoraError):
    """The body's media type is not one that this path takes."""

    code = "unsupported_media_type"
    title = "Unsupported media type"


class RangeNotSatisfiableError(BonsaiLoraError):
    """No byte of the asked range exists."""

    code = "range_not_satisfiable"
    title = "Range not satisfiable"


class InvalidError(BonsaiLoraError):
    """Well-formed, but wrong."""

    code = "invalid"
    title = "Invalid"


class InvalidRequestError(InvalidError):
    """A field, parameter or tensor is missing, unknown or of the wrong kind."""

    code = "invalid_request"
    title = "Invalid request"


class InvalidNameError(InvalidError):
    """A set or module name that cannot be used."""

    code = "invalid_name"
    title = "Invalid name"


class ShapeMismatchError(InvalidError):
    """An array has another shape than the adapter needs."""

    code = "shape_mismatch"
    title = "Shape mismatch"


class NonFiniteInputError(InvalidError):
    """An input holds NaN, infinity or a number beyond float32."""

    code = "non_finite_input"
    title = "Non-finite input"


class NonFiniteOutputError(InvalidError):
    """A result overflows float32 and the answer's form cannot say so."""

    code = "non_finite_output"
    title = "Non-finite output"


class RaggedInputError(InvalidError):
    """Rows of one batch have different lengths."""

    code = "ragged_input"
    title = "Ragged input"


class RankTooLargeError(InvalidError):
    """The rank is over the limit of the settings."""

    code = "rank_too_large"
    title = "Rank too large"


class DoraNeedsBaseError(InvalidError):
    """A DoRA module's outputs need the base: its checkpoint, and W x from the caller."""

    code = "dora_needs_base"
    title = "DoRA needs the base"


class InvalidBaseError(InvalidError):
    """The files of a base are no checkpoint."""

    code = "invalid_base"
    title = "Invalid base"


class InvalidAdapterError(InvalidError):
    """An adapter that contradicts itself."""

    code = "invalid_adapter"
    title = "Invalid adapter"


class UnsupportedAdapterError(InvalidError):
    """An adapter of a kind that would be applied wrongly here."""

    code = "unsupported_adapter"
    title = "Unsupported adapter"


class BusyError(BonsaiLoraError):
    """Too much work at once; nothing was begun."""

    code = "busy"
    title = "Busy"


class StalledError(BonsaiLoraError):
    """The client of a stream takes nothing; the answer is broken off, so no status goes out."""

    code = "stalled"
    title = "Stalled"


class BaseChangedError(BonsaiLoraError):
    """A file of a base was overwritten while it was read; what was mapped is gone."""

    code = "base_changed"
    title = "Base changed"


class MemoryBudgetError(BonsaiLoraError):
    """The set would not fit into the memory budget."""

    code = "memory_budget_exceeded"
    title = "Over the memory budget"


class StoreFullError(BonsaiLoraError):
    """The disk under the store is full."""

    code = "store_full"
    title = "Store full"


class StoreReadOnlyError(BonsaiLoraError):
    """The store cannot be written to."""

    code = "store_read_only"
    title = "Store read-only"


class NewerFormatError(BonsaiLoraError):
    """The set is in a format of a newer release; its file is left as it is."""

    code = "newer_format"
    title = "Newer format"

    def __init__(self, name: str, written: int, known: int) -> None:
        super().__init__(
            f"set {name!r} was written by a newer release, in record format {written}; this "
            f"release reads format {known} and leaves the file untouched. Upgrade the service to "
            "use, change or delete the set",
            set=name,
            got=written,
            expected=known,
        )


class UnsupportedFeatureError(BonsaiLoraError):
    """A feature that this service does not have, or that was not switched on."""

    code = "unsupported_feature"
    title = "Unsupported feature"


class InternalError(BonsaiLoraError):
    """A fault of the service; its log has the cause under the request id."""

    code = "internal_error"
    title = "Internal error"
