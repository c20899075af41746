"""Content types: the form of a request body, and the negotiated form of the response."""

from collections.abc import Collection
from enum import StrEnum

from bonsai_lora.errors import InvalidRequestError, NotAcceptableError, UnsupportedMediaTypeError


class Form(StrEnum):
    """An encoding of tensors; the value is its media type."""

    JSON = "application/json"
    BINARY = "application/vnd.safetensors"
    RAW = "application/octet-stream"


_FORMS: dict[str, Form] = {**{form: form for form in Form}, "application/safetensors": Form.BINARY}

RESPONSE_DTYPES = ("F32", "F16", "BF16")


def curl_hint(media: str) -> str:
    """Return what to add to an error about the Content-Type `media`, if curl may have chosen it."""
    if media != "application/x-www-form-urlencoded":
        return ""
    return " (curl's default is a form; add -H 'Content-Type: application/json')"


def parse_content_type(content_type: str | None, accepted: Collection[Form]) -> Form:
    """Return the form that a Content-Type names; JSON if the header is missing.

    Raises UnsupportedMediaTypeError for a form that is not in `accepted`.
    """
    media = (content_type or Form.JSON).partition(";")[0].strip().lower()
    form = _FORMS.get(media)
    if form is None or form not in accepted:
        expected = list(accepted)
        raise UnsupportedMediaTypeError(
            f"Content-Type {media[:100]!r} is not supported here; "
            f"send {' or '.join(expected)}{curl_hint(media)}",
            got=media,
            expected=expected,
        )
    return form


def negotiate_form(accept: str | None, default: Form, offered: Collection[Form]) -> Form:
    """Return the form that an Accept header prefers; `default` if it is missing or `*/*`.

    Follows RFC 9110, section 12.5.1 (quality values, wildcards). Raises NotAcceptableError if the
    client accepts none of `offered`.
    """
    if not accept or accept == "*/*":
        return default
    best, best_quality = None, 0.0
    for form in sorted(offered, key=lambda one: one is not default):
        quality = _quality(accept, form)
        if quality > best_quality:
            best, best_quality = form, quality
    if best is None:
        expected = list(offered)
        raise NotAcceptableError(
            f"Accept is {accept[:200]!r}, which the response cannot satisfy; "
            f"accept {' or '.join(expected)}",
            got=accept[:200],
            expected=expected,
        )
    return best


def _quality(accept: str, form: Form) -> float:
    """Return the quality value of `form` in the most specific matching part of `accept`."""
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


def check_response_dtype(dtype: str | None, form: Form) -> str:
    """Return the dtype of the response tensors: `dtype`, or F32 if it is None.

    Raises InvalidRequestError for an unknown dtype, or for F16 or BF16 in JSON.
    """
    if dtype is None:
        return "F32"
    if dtype not in RESPONSE_DTYPES:
        raise InvalidRequestError(
            f"dtype {dtype!r} cannot be returned; expected one of {', '.join(RESPONSE_DTYPES)}",
            got=dtype,
            expected=list(RESPONSE_DTYPES),
        )
    if dtype != "F32" and form is Form.JSON:
        raise InvalidRequestError(
            f"dtype {dtype!r} cannot be returned as JSON; request a binary response with "
            f"Accept: {Form.BINARY}",
            got=dtype,
            expected="F32",
        )
    return dtype
