"""Which form a body has and which form an answer takes."""

from collections.abc import Collection
from enum import Enum

from bonsai_lora.errors import InvalidRequestError, NotAcceptableError, UnsupportedMediaTypeError


class Form(Enum):
    """A form of tensors on the wire; the value is its media type."""

    JSON = "application/json"
    BINARY = "application/vnd.safetensors"
    RAW = "application/octet-stream"


_FORMS = {
    "application/json": Form.JSON,
    "application/vnd.safetensors": Form.BINARY,
    "application/safetensors": Form.BINARY,
    "application/octet-stream": Form.RAW,
}

ANSWER_DTYPES = ("F32", "F16", "BF16")


def request_form(content_type: str | None, taken: Collection[Form]) -> Form:
    """Return the form that a Content-Type names; no Content-Type means JSON.

    Raises UnsupportedMediaTypeError, with the types taken, for any other.
    """
    if content_type == "application/json":  # the common case, without parsing
        return Form.JSON
    media = (content_type or Form.JSON.value).partition(";")[0].strip().lower()
    form = _FORMS.get(media)
    if form is None or form not in taken:
        expected = [form.value for form in taken]
        hint = (
            " (curl's default; add -H 'Content-Type: application/json')" if "form" in media else ""
        )
        raise UnsupportedMediaTypeError(
            f"this path does not take Content-Type {media[:100]!r}{hint}; "
            f"send {' or '.join(expected)}",
            got=media,
            expected=expected,
        )
    return form


def answer_form(accept: str | None, default: Form, offered: Collection[Form]) -> Form:
    """Return the form that an Accept header prefers; absent or any: `default`.

    Follows RFC 9110 section 12.5.1 (quality values, wildcards). Raises NotAcceptableError where
    nothing offered is accepted.
    """
    if not accept or accept == "*/*":
        return default
    best, best_quality = None, 0.0
    for form in sorted(offered, key=lambda one: one is not default):
        quality = _quality(accept, form)
        if quality > best_quality:
            best, best_quality = form, quality
    if best is None:
        expected = [form.value for form in offered]
        raise NotAcceptableError(
            f"Accept is {accept[:200]!r}, but the answer can only be {' or '.join(expected)}",
            got=accept[:200],
            expected=expected,
        )
    return best


def _quality(accept: str, form: Form) -> float:
    """Return the quality that the most specific matching part of `accept` gives `form`."""
    best = (-1, 0.0)
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        specific = _specificity(media, form)
        quality = next((_number(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if specific > best[0]:
            best = (specific, quality)
    return best[1] if best[0] >= 0 else 0.0


def _specificity(media: str, form: Form) -> int:
    if media == "*/*":
        return 0
    if media == "application/*":
        return 1
    return 2 if _FORMS.get(media) is form else -1


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def check_answer_dtype(dtype: str | None, form: Form) -> str:
    """Return the dtype of the answer's tensors: F32 unless `dtype` asks otherwise.

    Raises InvalidRequestError for an unknown dtype, or one that JSON cannot carry.
    """
    if dtype is None:
        return "F32"
    if dtype not in ANSWER_DTYPES:
        raise InvalidRequestError(
            f"dtype {dtype!r} cannot be answered; expected one of {', '.join(ANSWER_DTYPES)}",
            got=dtype,
            expected=list(ANSWER_DTYPES),
        )
    if dtype != "F32" and form is Form.JSON:
        raise InvalidRequestError(
            f"dtype {dtype} is for binary answers only; ask for them with "
            f"Accept: {Form.BINARY.value}",
            got=dtype,
            expected="F32",
        )
    return dtype
