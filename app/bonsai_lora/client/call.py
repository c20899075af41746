"""A call of the HTTP contract as a value: what to send, and how to decode the answer.

Nothing here does I/O. `calls` makes these values; `Client` and `AsyncClient` send them.
"""

import functools
import json
import os
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx

from bonsai_lora.errors import BonsaiLoraError, InvalidNameError, InvalidRequestError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Part = bytes | os.PathLike[str] | BinaryIO
"""A file of an upload: its bytes, where it is, or the open file."""

Query = Sequence[tuple[str, str]]

BLOCK_BYTES = 1 << 20
"""Most bytes of a stream in memory at a time."""


def decode_json(answer: httpx.Response) -> Any:
    """Return the JSON value of an answer."""
    return answer.json()


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[T_co]):
    """One request, and the function that decodes its answer."""

    method: str = "GET"
    path: str
    decode: Callable[[httpx.Response], T_co] = decode_json
    """Makes the result of an answer whose body has been read."""
    query: Query = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | Iterable[bytes] | AsyncIterable[bytes] | None = None
    parts: Mapping[str, Part] | None = None
    """The files of a multipart form, instead of `content`."""
    is_pure: bool = False
    """Whether it changes nothing, although it is not a GET."""

    @property
    def is_safe(self) -> bool:
        """Whether it changes nothing, so that it may be sent again after any failure."""
        return self.is_pure or self.method == "GET"

    @property
    def is_one_shot(self) -> bool:
        """Whether its body can be read only once."""
        parts = (self.parts or {}).values()
        return isinstance(self.content, Iterator | AsyncIterator) or not all(
            isinstance(one, bytes | os.PathLike) for one in parts
        )


@contextmanager
def opened(call: Call[Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `httpx.Client.build_request`; files are open inside the block.

    Raises OSError if a file cannot be opened.
    """
    with ExitStack() as stack:
        options: dict[str, Any] = {
            "method": call.method,
            "url": call.path,
            "headers": {"Accept-Encoding": "identity", **call.headers},
        }
        if call.query:
            options["params"] = list(call.query)
        if call.parts is not None:
            options["files"] = {
                name: stack.enter_context(open(part, "rb"))  # noqa: PTH123 - any PathLike
                if isinstance(part, os.PathLike)
                else part
                for name, part in call.parts.items()
            }
        elif call.content is not None:
            options["content"] = call.content
        yield options


def path_of(*segments: str) -> str:
    """Return the path of `segments`, each quoted: `/v1/sets/NAME`.

    Raises InvalidNameError for an empty segment and for `.` and `..`, which would name a
    different resource.
    """
    for segment in segments:
        if segment in ("", ".", ".."):
            raise InvalidNameError(
                f"{segment!r} is not a name; expected letters, digits, '.', '_' or '-'", got=segment
            )
    return "".join(f"/{quote(segment, safe='')}" for segment in segments)


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def query_of(**values: object) -> list[tuple[str, str]]:
    """Return query parameters, without those that are None; booleans as `true` and `false`."""
    return [
        (name, str(value).lower() if isinstance(value, bool) else str(value))
        for name, value in given(**values).items()
    ]


class MixOptions(TypedDict, total=False):
    """Options of a merged model, which `list_merged_files` describes."""

    scale: float
    sets: Mapping[str, float] | None
    match: str | None


def mix_query(
    *, scale: float = 1.0, sets: Mapping[str, float] | None = None, match: str | None = None
) -> Query:
    """Return the query of a merged model."""
    names = [("set", name) for name in sets or {}]
    weights = [("weight", str(weight)) for weight in (sets or {}).values()]
    return [*query_of(scale=None if scale == 1.0 else scale, match=match), *names, *weights]


def header_lines(**values: str | None) -> dict[str, str]:
    """Return headers, without those that are None: `if_match` is `If-Match`."""
    return {name.replace("_", "-").title(): value for name, value in given(**values).items()}


def json_body(value: Any, **headers: str | None) -> dict[str, Any]:
    """Return the fields of a call that sends `value` as JSON, with these `header_lines`."""
    return {
        "content": json.dumps(value).encode(),
        "headers": {"Content-Type": "application/json", **header_lines(**headers)},
    }


def decoded(call: Call[T], answer: httpx.Response) -> T:
    """Return the result of a call; raises httpx.DecodingError if it has a different form."""
    try:
        return call.decode(answer)
    except (BonsaiLoraError, ValueError, KeyError, TypeError) as error:
        raise httpx.DecodingError(
            f"the answer to {call.method} {answer.request.url} cannot be decoded: {error!r}",
            request=answer.request,
        ) from error


def decode_tagged(answer: httpx.Response) -> Any:
    """Return the JSON object of an answer with its ETag added as `etag`."""
    return {**decode_json(answer), "etag": answer.headers.get("etag", "")}


def decode_field(name: str) -> Callable[[httpx.Response], Any]:
    """Return the function that decodes one field of a JSON object."""
    return lambda answer: answer.json()[name]


def decode_nothing(_answer: httpx.Response) -> None:
    """Return None: the status has said everything."""


def decode_text(answer: httpx.Response) -> str:
    """Return the text of an answer."""
    return answer.text


def decode_bytes(answer: httpx.Response) -> bytes:
    """Return the body of an answer."""
    return answer.content


def blocks_of(
    source: BinaryIO | Iterable[bytes] | AsyncIterable[bytes],
) -> Iterable[bytes] | AsyncIterable[bytes]:
    """Return the blocks of a file opened in binary mode; other iterables as they are.

    Raises InvalidRequestError for a path, which would be sent as the weights.
    """
    if isinstance(source, str | os.PathLike):
        raise InvalidRequestError(
            f"weights is a {type(source).__name__}; expected a file opened in binary mode, or an "
            "iterable of bytes",
            field="weights",
        )
    if hasattr(source, "read"):
        return iter(functools.partial(source.read, BLOCK_BYTES), b"")
    return source


def range_of(start: int, stop: int | None, tag: str | None) -> dict[str, str]:
    """Return the headers for the bytes [start, stop), none for a whole file.

    With `tag`, an ETag without quotes, they ask for the whole file if that has changed.
    """
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"there are no bytes from {start} to {stop}")
    if start == 0 and stop is None:
        return {}
    last = "" if stop is None else stop - 1
    return {"Range": f"bytes={start}-{last}", **({"If-Range": f'"{tag}"'} if tag else {})}


def weighted(sets: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the JSON value of sets with their weights; raises InvalidRequestError."""
    if not isinstance(sets, Mapping):
        raise InvalidRequestError(
            f"sets is a {type(sets).__name__}; expected a mapping from names to weights, such as "
            '{"a": 1.0}',
            field="sets",
        )
    return [{"set": name, "weight": weight} for name, weight in sets.items()]


def checked_names(names: Sequence[str], what: str = "sets") -> Sequence[str]:
    """Return names of sets or modules; raises InvalidRequestError for a text, which has letters."""
    if isinstance(names, str):
        raise InvalidRequestError(
            f"{what} is the text {names[:100]!r}; expected a list of names", field=what
        )
    return names
