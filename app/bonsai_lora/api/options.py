"""Query parameters and headers of the hot routes: one table drives parsing and OpenAPI.

Parsing is a pure function of the query string and a few headers. Clients send the same ones
thousands of times, so the results for short ones are cached.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl

from bonsai_lora.api.body import check_coding
from bonsai_lora.api.call import Call
from bonsai_lora.api.deps import VERSION_DESCRIPTION
from bonsai_lora.api.query import check_known, plain_number
from bonsai_lora.errors import InvalidRequestError, MalformedBodyError
from bonsai_lora.wire.compress import parse_content_encoding, response_coding
from bonsai_lora.wire.media import (
    RESPONSE_DTYPES,
    Form,
    check_response_dtype,
    negotiate_form,
    parse_content_type,
)
from bonsai_lora.wire.stacks import MAX_SCALE

T = TypeVar("T")

HEADER_LENGTH = b"inference-header-content-length"
"""Length in bytes of an inference's JSON header (Triton's extension binary_tensor_data)."""

_VERSION = re.compile("[1-9][0-9]{0,15}")
_VERSION_HINT = re.compile(rb"(?:^|&)version=([1-9][0-9]{0,15})(?:&|$)")
_REMEMBERED_BYTES = 1 << 10
_HEADER_LENGTH_DIGITS = 15


@dataclass(frozen=True, eq=False, slots=True)
class Option:
    """A query parameter or header that a route reads."""

    name: str
    place: Literal["query", "header"]
    parse: Callable[[list[str]], Any]
    """Return the value parsed from all occurrences of the name; there may be none."""
    description: str = ""
    schema: Mapping[str, Any] | None = None
    """JSON Schema; None for headers that OpenAPI describes elsewhere."""


Options = tuple[Option, ...]
"""All options of a route."""


def parameters(options: Options) -> list[dict[str, Any]]:
    """Return the OpenAPI parameter objects of a route."""
    return [
        {
            "name": one.name,
            "in": one.place,
            "required": False,
            "schema": dict(one.schema),
            "description": one.description,
        }
        for one in options
        if one.schema is not None
    ]


def read_options(call: Call, options: Options, make: Callable[[Mapping[str, Any]], T]) -> T:
    """Return `make` called with the parsed values of `options` by name; `make` must be pure.

    Raises InvalidRequestError for an unknown query parameter, unless the route has none, and the
    errors of the parsers and of `make`.
    """
    lines = tuple(map(call.headers.get, _header_names(options)))
    size = len(call.query_string) + sum(map(len, filter(None, lines)))
    read = _read if size <= _REMEMBERED_BYTES else _read.__wrapped__
    return read(options, make, call.query_string, lines)  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _header_names(options: Options) -> Sequence[bytes]:
    return [one.name.lower().encode() for one in options if one.place == "header"]


@lru_cache(maxsize=512)
def _read(
    options: Options,
    make: Callable[[Mapping[str, Any]], Any],
    query: bytes,
    headers: Sequence[bytes | None],
) -> Any:
    known = [one.name for one in options if one.place == "query"]
    texts = _query(query, known) if known else {}
    lines = iter(headers)
    for one in options:
        line = next(lines) if one.place == "header" else None
        if line is not None:
            texts[one.name] = [line.decode("latin-1")]
    return make(MappingProxyType({one.name: one.parse(texts.get(one.name, [])) for one in options}))


def _query(text: bytes, known: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in parse_qsl(text.decode("latin-1"), keep_blank_values=True):
        found.setdefault(name, []).append(value)
    check_known(found, known)
    return found


@dataclass(frozen=True, eq=False, slots=True)
class ApplyOptions:
    """The options of an apply request."""

    request_form: Form
    """Form of the request body."""
    response_form: Form
    """Form of the response body."""
    dtype: str
    scale: float
    match: str | None
    modules: Sequence[str]
    version: int | None
    """The version of the path's set that is wanted."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ApplyOptions":
        """Return the options; raises UnsupportedMediaTypeError, NotAcceptableError and others."""
        check_coding(values["Content-Encoding"])
        request_form = parse_content_type(values["Content-Type"], _FORMS)
        response_form = negotiate_form(values["Accept"], request_form, _FORMS)
        dtype = check_response_dtype(values["dtype"], response_form)
        return cls(
            request_form,
            response_form,
            dtype,
            values["scale"],
            values["match"],
            values.get("module", []),
            values.get("version"),
        )


_FORMS = (Form.JSON, Form.BINARY)


def _last(values: list[str]) -> str | None:
    return values[-1] if values else None


def _scale(values: list[str]) -> float:
    text = values[-1] if values else "1"
    try:
        scale = float(plain_number(text))
    except ValueError:
        scale = float("nan")
    if not abs(scale) <= MAX_SCALE:
        raise InvalidRequestError(
            f"scale is {text[:100]!r}; expected a number from -{MAX_SCALE:g} to {MAX_SCALE:g}",
            field="scale",
        )
    return scale


def _version(values: list[str]) -> int | None:
    if not values:
        return None
    if _VERSION.fullmatch(values[-1]) is None:
        raise InvalidRequestError(
            f"version is {values[-1][:100]!r}; expected a whole number from 1", field="version"
        )
    return int(values[-1])


def version_hint(query: bytes) -> int | None:
    """Return the version in a query that may be malformed; None if there is none."""
    found = _VERSION_HINT.search(query) if b"version" in query else None
    return None if found is None else int(found[1])


_MEDIA = (
    Option("Content-Type", "header", _last),
    Option("Accept", "header", _last),
    Option("Content-Encoding", "header", _last),
)
APPLY_OPTIONS: Options = (
    Option(
        "dtype",
        "query",
        _last,
        "dtype of the returned tensors; F16 and BF16 only in binary responses",
        {"type": "string", "enum": list(RESPONSE_DTYPES), "default": "F32"},
    ),
    Option(
        "scale",
        "query",
        _scale,
        "factor applied to the whole delta",
        {"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE, "default": 1.0},
    ),
    Option(
        "match",
        "query",
        _last,
        "prefix of the base tensors to use for DoRA modules found more than once in the base; "
        "irrelevant to other modules, which do not need the base",
        {"type": "string"},
    ),
    *_MEDIA,
)
APPLY_ONE_OPTIONS: Options = (
    Option(
        "version",
        "query",
        _version,
        VERSION_DESCRIPTION,
        {"type": "integer", "minimum": 1},
    ),
    *APPLY_OPTIONS,
)
APPLY_MANY_OPTIONS: Options = (
    Option(
        "module",
        "query",
        list,
        "module to apply to the shared batch `inputs`; repeatable",
        {"type": "array", "items": {"type": "string"}},
    ),
    *APPLY_ONE_OPTIONS,
)


@dataclass(frozen=True, eq=False, slots=True)
class InferOptions:
    """The options of an inference request."""

    header_length: int | None
    """Length in bytes of the JSON before the binary data; None if the body is JSON only."""
    request_coding: str | None
    """Content coding of the request body."""
    response_coding: str | None
    """Content coding of the response."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "InferOptions":
        """Return the options."""
        return cls(*values.values())


def _header_length(values: list[str]) -> int | None:
    if not values:
        return None
    given = values[-1]
    if not (given.isascii() and given.isdigit() and len(given) <= _HEADER_LENGTH_DIGITS):
        raise MalformedBodyError(
            f"Inference-Header-Content-Length is {given[:100]!r}; expected a number of bytes"
        )
    return int(given)


INFER_OPTIONS: Options = (
    Option(
        "Inference-Header-Content-Length",
        "header",
        _header_length,
        "length in bytes of the JSON before the binary data",
        {"type": "integer", "minimum": 0},
    ),
    Option("Content-Encoding", "header", lambda values: parse_content_encoding(_last(values))),
    Option("Accept-Encoding", "header", lambda values: response_coding(_last(values))),
)
