"""One request and its answer in plain ASGI, for the routes that the framework never sees."""

from collections.abc import Collection, Sequence
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from app.api.body import check_coding, check_length, parse_length, read_all
from app.api.direct import direct_body
from app.errors import InvalidRequestError
from app.wire.media import Form, answer_form, check_answer_dtype, request_form
from app.wire.stacks import MAX_SCALE
from app.wire.tensors import Buffer

JOINED_BYTES = 1 << 16
"""Answers up to this length are copied into one piece: less to do than two pieces."""

_NO_QUERY: dict[str, list[str]] = {}


class Call:
    """Headers and body of a request, and the way to answer it."""

    __slots__ = ("_headers", "_receive", "_scope", "_send")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        lines: list[tuple[bytes, bytes]] = scope["headers"]
        self._headers = dict(lines)
        if len(self._headers) != len(lines):
            for name in self._headers:  # RFC 9110 section 5.3: lines of one name are one list
                self._headers[name] = b", ".join(value for one, value in lines if one == name)

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    def query(self, *known: str) -> dict[str, list[str]]:
        """Return the query's values by name; raises InvalidRequestError for others than `known`."""
        text = self._scope["query_string"]
        if not text:
            return _NO_QUERY
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

    def forms(self, forms: Collection[Form]) -> tuple[Form, Form]:
        """Return the form of the body and of the answer, out of `forms`.

        Raises UnsupportedMediaTypeError, NotAcceptableError.
        """
        check_coding(self.header(b"content-encoding"))
        taken = request_form(self.header(b"content-type"), forms)
        return taken, answer_form(self.header(b"accept"), taken, forms)

    async def body(self, limit: int, stall_seconds: float) -> Buffer:
        """Return the whole body, without copies where the server can do that.

        Raises BodyTooLargeError over `limit` bytes, StalledError.
        """
        declared = self._headers.get(b"content-length")
        if declared is not None:
            check_length(parse_length(declared), limit)
        direct = direct_body(self._scope)
        if direct is None:
            return await read_all(self._receive, limit)
        return await direct.read(stall_seconds)

    async def answer(
        self,
        parts: Sequence[Buffer],
        media_type: str,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """Send 200 with a body in `parts`, which are not copied where they are long."""
        length = sum(map(len, parts))
        lines = [
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % length),
            *headers,
        ]
        send = self._send
        await send({"type": "http.response.start", "status": 200, "headers": lines})
        if length <= JOINED_BYTES:
            parts = (b"".join(parts),)
        for part in parts[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": parts[-1]})


def answer_options(query: dict[str, list[str]], given: Form) -> tuple[str, float]:
    """Return the answer's dtype and the scale that a query asks for; raises InvalidRequestError."""
    if not query:
        return "F32", 1.0
    dtype = query.get("dtype", [None])[-1]
    return check_answer_dtype(dtype, given), _scale(query.get("scale", ["1"])[-1])


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
