"""One request and its answer, for the routes that the framework never sees."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from bonsai_lora.api.body import check_coding, check_length, parse_length, read_all
from bonsai_lora.api.request_head import join_lines
from bonsai_lora.core.cast import Floats
from bonsai_lora.errors import InvalidRequestError
from bonsai_lora.service.plans import Plan
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.media import Form, answer_form, check_answer_dtype, request_form
from bonsai_lora.wire.stacks import MAX_SCALE

JOINED_BYTES = 1 << 16
"""Answers up to this length are copied into one piece: less to do than two pieces."""

Lines = Sequence[tuple[bytes, bytes]]
"""Header lines."""

Counted = tuple[str, str, str]
"""A model's name, the tag of its content, and since when it has that."""

Key = bytes | tuple[Any, ...]
"""What requests that differ in their numbers alone have in common: the first bytes of a body, which
say what the others are, or JSON without its lists (`json.Taken.form`)."""

Recalled = tuple[Plan, Sequence[Floats]]
"""How to answer a request, and the lists that were taken out of its JSON."""

_FORMS = (Form.JSON, Form.BINARY)


class Call(ABC):
    """Headers and body of a request, and the way to answer it."""

    __slots__ = ("_headers", "_noted", "_query_string")

    can_plan = False
    """Whether there is any use in `remember_plan`."""

    def __init__(self, headers: Mapping[bytes, bytes], query_string: bytes) -> None:
        self._headers = headers
        self._query_string = query_string
        self._noted: tuple[StoredSet, Key, Plan, Counted | None] | None = None

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name."""
        return _text(self._headers.get(name))

    def options(self, *known: str) -> "Options":
        """Return what the head asks of an apply; `known` are the query parameters that it takes.

        Raises InvalidRequestError for others, or wrong values, UnsupportedMediaTypeError,
        NotAcceptableError.
        """
        header = self._headers.get
        return _options(
            known,
            self._query_string,
            header(b"content-type"),
            header(b"accept"),
            header(b"content-encoding"),
        )

    async def body(self, limit: int, stall_seconds: float) -> Buffer:
        """Return the whole body, without copies where the server can do that.

        Raises BodyTooLargeError over `limit` bytes, StalledError.
        """
        declared = self._headers.get(b"content-length")
        if declared is not None:
            check_length(parse_length(declared), limit)
        return await self._read(limit, stall_seconds)

    async def answer(self, parts: Sequence[Buffer], media_type: str, headers: Lines = ()) -> None:
        """Send 200 with a body in `parts`, which are not copied where they are long."""
        lines = [(b"content-type", media_type.encode()), (b"content-length", b""), *headers]
        await self._send_answer(with_length(lines, parts), parts)

    def remember_plan(
        self, stored: StoredSet, form: Key, plan: Plan | None, model: Counted | None = None
    ) -> None:
        """Take note of how to answer the next request with this head and `form`, if it can be.

        `model` is what an inference is counted as.
        """
        self._noted = None if plan is None else (stored, form, plan, model)

    def find_plan(self, body: Buffer) -> Recalled | None:
        """Return the plan for a request with this head and `body`, if there is one."""
        del body
        return None

    @abstractmethod
    async def _read(self, limit: int, stall_seconds: float) -> Buffer: ...

    @abstractmethod
    async def _send_answer(self, lines: Lines, parts: Sequence[Buffer]) -> None: ...


def with_length(lines: Lines, parts: Sequence[Buffer]) -> Lines:
    """Return the lines of an answer, of which the second is its length, for other parts."""
    return [lines[0], (b"content-length", b"%d" % sum(map(len, parts))), *lines[2:]]


class AsgiCall(Call):
    """A call that came through an ASGI server."""

    __slots__ = ("_receive", "_send")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(join_lines(scope["headers"]), scope["query_string"])
        self._receive = receive
        self._send = send

    async def _read(self, limit: int, stall_seconds: float) -> Buffer:
        del stall_seconds  # the middleware looks after that
        return await read_all(self._receive, limit)

    async def _send_answer(self, lines: Lines, parts: Sequence[Buffer]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": [*lines]})
        if sum(map(len, parts)) <= JOINED_BYTES:
            parts = (b"".join(parts),)
        for part in parts[:-1]:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
        await self._send({"type": "http.response.body", "body": parts[-1]})


@dataclass(frozen=True, eq=False, slots=True)
class Options:
    """What the head of a request asks of an apply."""

    taken: Form
    """Of the body."""
    given: Form
    """Of the answer."""
    dtype: str
    scale: float
    modules: Sequence[str]
    match: str | None


@lru_cache(maxsize=256)
def _options(
    known: tuple[str, ...],
    query_string: bytes,
    content_type: bytes | None,
    accept: bytes | None,
    coding: bytes | None,
) -> Options:
    query = _query(query_string, known)
    check_coding(_text(coding))
    taken = request_form(_text(content_type), _FORMS)
    given = answer_form(_text(accept), taken, _FORMS)
    dtype = check_answer_dtype(query.get("dtype", [None])[-1], given)
    scale = _scale(query.get("scale", ["1"])[-1])
    match = query.get("match", [None])[-1]
    return Options(taken, given, dtype, scale, query.get("module", []), match)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _query(text: bytes, known: Collection[str]) -> dict[str, list[str]]:
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


def _scale(text: str) -> float:
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
