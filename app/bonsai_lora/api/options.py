"""What the head of a request asks for: tables that make both a parser and OpenAPI parameters.

Parsing is a pure function of the query string and of some headers. Clients send the same ones
thousands of times, so it is remembered by these bytes, as far as they are short.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl

from bonsai_lora.api.body import check_coding
from bonsai_lora.api.call import Call
from bonsai_lora.errors import InvalidRequestError, MalformedBodyError
from bonsai_lora.wire.compress import coding_of, wanted_coding
from bonsai_lora.wire.media import (
    ANSWER_DTYPES,
    Form,
    answer_form,
    check_answer_dtype,
    request_form,
)
from bonsai_lora.wire.stacks import MAX_SCALE

T = TypeVar("T")

HEADER_LENGTH = b"inference-header-content-length"
"""Length of an inference's JSON, before binary data (Triton's extension binary_tensor_data)."""

_REMEMBERED_BYTES = 1 << 10
_HEADER_LENGTH_DIGITS = 15


@dataclass(frozen=True, eq=False, slots=True)
class Option:
    """A query parameter, or a header, that a route reads."""

    name: str
    place: Literal["query", "header"]
    parse: Callable[[list[str]], Any]
    """Returns the value of all that the client gave under this name, which may be nothing."""
    description: str = ""
    schema: Mapping[str, Any] | None = None
    """JSON Schema; None for the headers that OpenAPI describes in other ways."""

    @property
    def key(self) -> bytes:
        """A header's name as requests have it."""
        return self.name.lower().encode()


Options = tuple[Option, ...]
"""The options of a route."""


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
    """Return what `make` makes of the values of `options` by name; it must be pure.

    Raises InvalidRequestError for another query parameter, where a query is read at all, and what
    the options' parsers and `make` raise.
    """
    lines = tuple([call.headers.get(one.key) for one in options if one.place == "header"])
    size = len(call.query_string) + sum([len(one) for one in lines if one is not None])
    read = _read if size <= _REMEMBERED_BYTES else _read.__wrapped__
    return read(options, make, call.query_string, lines)  # type: ignore[no-any-return]


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
        if name not in known:
            raise InvalidRequestError(
                f"unknown query parameter {name[:100]!r}; known are {', '.join(known)}",
                got=name[:100],
                expected=list(known),
            )
        found.setdefault(name, []).append(value)
    return found


@dataclass(frozen=True, eq=False, slots=True)
class ApplyOptions:
    """What the head of an apply asks for."""

    taken: Form
    """Form of the body."""
    given: Form
    """Form of the answer."""
    dtype: str
    scale: float
    modules: Sequence[str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ApplyOptions":
        """Return the options; raises UnsupportedMediaTypeError, NotAcceptableError and others."""
        check_coding(values["Content-Encoding"])
        taken = request_form(values["Content-Type"], _FORMS)
        given = answer_form(values["Accept"], taken, _FORMS)
        dtype = check_answer_dtype(values["dtype"], given)
        return cls(taken, given, dtype, values["scale"], values.get("module", []))


_FORMS = (Form.JSON, Form.BINARY)


def _last(values: list[str]) -> str | None:
    return values[-1] if values else None


def _scale(values: list[str]) -> float:
    text = values[-1] if values else "1"
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    if not abs(scale) <= MAX_SCALE:
        raise InvalidRequestError(
            f"scale must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}, got {text[:100]!r}",
            field="scale",
        )
    return scale


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
        "dtype of the answer's tensors; other than F32 only in binary",
        {"type": "string", "enum": list(ANSWER_DTYPES), "default": "F32"},
    ),
    Option(
        "scale",
        "query",
        _scale,
        "factor on everything that is added",
        {"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE, "default": 1.0},
    ),
    *_MEDIA,
)
APPLY_MANY_OPTIONS: Options = (
    Option(
        "module",
        "query",
        list,
        "modules that all get the one batch `inputs`; repeatable",
        {"type": "array", "items": {"type": "string"}},
    ),
    *APPLY_OPTIONS,
)


@dataclass(frozen=True, eq=False, slots=True)
class InferOptions:
    """What the head of an inference says."""

    header_length: int | None
    """Bytes of JSON before the binary data; None: there is nothing but JSON."""
    coding: str | None
    """Compression of the body."""
    wanted_coding: str | None
    """Compression of the answer."""

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
            f"Inference-Header-Content-Length is {given[:100]!r}, expected a number of bytes"
        )
    return int(given)


INFER_OPTIONS: Options = (
    Option(
        "Inference-Header-Content-Length",
        "header",
        _header_length,
        "length in bytes of the JSON before binary data",
        {"type": "integer", "minimum": 0},
    ),
    Option("Content-Encoding", "header", lambda values: coding_of(_last(values))),
    Option("Accept-Encoding", "header", lambda values: wanted_coding(_last(values))),
)
