"""Tensors as JSON: nested lists of finite numbers, parsed and written in bulk."""

import contextlib
import heapq
import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from secrets import token_hex
from typing import Any

import numpy as np
import orjson

from bonsai_lora.core.backend import find_lists, list_of
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.errors import (
    InvalidRequestError,
    MalformedJsonError,
    RaggedInputError,
    TakesLongError,
    counted,
    one_of,
)
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.finite import check_finite
from bonsai_lora.wire.long_lists import find_long_lists

_TENSOR_KEYS = frozenset({"inputs", "base_outputs", "data", "weights", "lora_A", "lora_B"})
"""Fields whose lists of numbers may be parsed straight into arrays."""

_SHORT_BYTES = 1 << 10
"""In shorter texts, parsing into lists is as fast."""
_LEAST_NUMBERS = 64
"""Shorter lists are parsed into lists."""
_MOST_LISTS = 1 << 18
"""Most lists and objects in JSON: each takes up to fifty times as much memory as text, and no other
thread runs until all are there."""
_MOST_STRINGS = 1 << 19
_BLOCK_BYTES = 1 << 16
"""So much stays in the cache of a core."""
_PIECE_NUMBERS = 1 << 14
"""Numbers that NumPy converts from a list at a time."""
_LONG_TEXT_BYTES = 1 << 18
"""Parsing more text into lists takes milliseconds, too long for the event loop."""
_PLACEHOLDER = token_hex(8)
"""Marks the position of an array in JSON text; random, so that no client can forge it."""


def decode_object(
    body: Buffer, allowed: frozenset[str], *, may_take_long: bool = True
) -> dict[str, Any]:
    """Return the JSON object `body`, with arrays as `decode_with_arrays` does.

    Raises MalformedJsonError if it is not JSON, InvalidRequestError if it is not an object or has
    a field that is not in `allowed`.
    """
    if body[8:9] == b"{" and int.from_bytes(body[:8], "little") < len(body):
        raise MalformedJsonError(
            "the body looks like safetensors, but its Content-Type is that of JSON, or missing; "
            "send it with Content-Type: application/vnd.safetensors"
        )
    value = decode_with_arrays(body, may_take_long=may_take_long)
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"the body is {_kind(value)}; expected a JSON object", expected=sorted(allowed)
        )
    unknown = first_names(name for name in value if name not in allowed)
    if unknown:
        raise InvalidRequestError(
            f"unknown field {unknown[0][:100]!r}; expected {one_of(sorted(allowed))}",
            got=[name[:100] for name in unknown],
            expected=sorted(allowed),
        )
    return value


def first_names(names: Iterable[str]) -> list[str]:
    """Return up to eight names that are first in order; sorting many lets no thread run."""
    return heapq.nsmallest(8, names)


def decode(body: Buffer, what: str = "the body", hint: str = "") -> Any:
    """Return the JSON value `body`.

    Raises MalformedJsonError, whose text calls the value `what` and ends with `hint`.
    """
    try:
        return _parse_in_pieces(body)
    except ValueError as error:
        found = _decode_more(body)
        if found is None:
            fault = f"is not JSON: {error}" if body else "is empty"
            raise MalformedJsonError(f"{what} {fault}; send JSON{hint}") from None
        return found


def decode_with_arrays(
    body: Buffer, what: str = "the body", hint: str = "", *, may_take_long: bool = True
) -> Any:
    """Return the JSON value `body` like `decode`, with tensors in it as float32 arrays.

    Tensors are lists of numbers, one or two deep and not ragged, in the fields of _TENSOR_KEYS.
    Some may remain lists; `decode_tensor` accepts both and validates them. Raises
    InvalidRequestError for too many lists, objects or strings, and TakesLongError if much is left
    to parse beside these tensors, unless it `may_take_long`.
    """
    if len(body) > _MOST_LISTS:
        check_lists(body, what)
    text, arrays = _extract_lists(body)
    if len(text) > _LONG_TEXT_BYTES and not may_take_long:
        raise TakesLongError
    if arrays:
        try:
            return _with_values(orjson.loads(text), arrays)
        except (ValueError, RecursionError):  # invalid or unusual: fall back to the normal path
            if len(body) > _LONG_TEXT_BYTES and not may_take_long:
                raise TakesLongError from None
    return decode(body, what, hint)


def check_lists(text: Buffer, what: str) -> None:
    """Raise InvalidRequestError if JSON has too many lists, objects or strings."""
    count = _count(text, "[") + _count(text, "{")
    if count > _MOST_LISTS:
        raise InvalidRequestError(
            f"{what} has {count} lists and objects, but the limit is {_MOST_LISTS}; send fewer "
            "rows at once, or safetensors",
            got=count,
            limit=_MOST_LISTS,
        )
    count = _count(text, '"') // 2
    if count > _MOST_STRINGS:
        raise InvalidRequestError(
            f"{what} has {count} strings, but the limit is {_MOST_STRINGS}; send fewer rows at "
            "once",
            got=count,
            limit=_MOST_STRINGS,
        )


def _count(text: Buffer, character: str) -> int:
    """Return how often a character occurs; five times as fast as `bytes.count`."""
    codes = np.frombuffer(text, np.uint8)
    blocks = (codes[at : at + _BLOCK_BYTES] for at in range(0, len(codes), _BLOCK_BYTES))
    return sum(int(np.count_nonzero(one == ord(character))) for one in blocks)


def _extract_lists(body: Buffer) -> tuple[bytes, list[Floats]]:
    """Replace long lists of numbers in JSON text by placeholders, and parse them into arrays.

    If a list was inside a string, the text is not valid JSON: the placeholder's quotes end the
    string.
    """
    lists = find_lists(body, _LEAST_NUMBERS) if len(body) > _SHORT_BYTES else []
    text = _without_lists(body, [(one.start, one.end) for one in lists])
    return text, [one.numbers for one in lists]


def _without_lists(body: Buffer, spans: Iterable[tuple[int, int]]) -> bytes:
    """Return JSON text with a placeholder for each span, numbered in order."""
    parts: list[Buffer] = []
    at = 0
    for number, (start, end) in enumerate(spans):
        parts += (body[at:start], b'{"%b":%d}' % (_PLACEHOLDER.encode(), number))
        at = end
    return b"".join([*parts, body[at:]])


def _with_values(
    value: Any, values: Sequence[Floats] | Sequence[list[Any]], *, is_tensor: bool = False
) -> Any:
    """Replace placeholders by their values, in place.

    Raises ValueError for an array that is not in a tensor.
    """
    if isinstance(value, list):
        for place, one in enumerate(value):
            value[place] = _with_values(one, values)
    elif isinstance(value, dict):
        if _PLACEHOLDER in value:
            found = values[value[_PLACEHOLDER]]
            if not is_tensor and not isinstance(found, list):
                raise ValueError
            return found
        for key, one in value.items():
            value[key] = _with_values(one, values, is_tensor=is_tensor or key in _TENSOR_KEYS)
    return value


def _parse_in_pieces(body: Buffer) -> Any:
    """Return the JSON value `body`, long lists parsed piece by piece; raises ValueError."""
    lists = find_long_lists(body, _parse_piece) if len(body) > _LONG_TEXT_BYTES else []
    if lists:
        text = _without_lists(body, [(start, end) for start, end, _ in lists])
        with contextlib.suppress(ValueError, RecursionError):  # invalid: orjson says where
            return _with_values(orjson.loads(text), [values for *_, values in lists])
    return orjson.loads(body)


def _parse_piece(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)  # NaN is refused later, with its position


def _decode_more(body: Buffer) -> Any:
    """Return JSON that only the standard library accepts; None if it does not either.

    It accepts NaN, Infinity and 1e400, which many programs write, so that the check for finite
    numbers can report their index. Lone surrogates are not accepted: they cannot be encoded again.
    """
    text = bytes(body)
    if rb"\ud" in text.lower():
        return None
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def decode_tensor(value: Any, name: str) -> Floats:
    """Return nested lists, or an array parsed from them, as float32 (width,) or (rows, width).

    Raises InvalidRequestError for anything but lists of numbers one or two deep, RaggedInputError
    for rows of different lengths, NonFiniteInputError for a number beyond float32.
    """
    if isinstance(value, np.ndarray):
        check_finite(value, name)
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"{name!r} is {_kind(value)}; expected a list of numbers, or a list of such lists",
            field=name,
        )
    floats = _to_floats(value, name)
    check_finite(floats, name)
    return floats


def encode(value: dict[str, Any]) -> list[Buffer]:
    """Return `value` as JSON in parts; finite float32 arrays in it are written by `list_of`."""
    lists: list[Buffer] = []

    def encode_array(array: Any) -> str:
        lists.append(list_of(array))
        return _PLACEHOLDER

    text = orjson.dumps(value, default=encode_array)
    first, *others = text.split(f'"{_PLACEHOLDER}"'.encode())
    return [first, *(part for pair in zip(lists, others, strict=True) for part in pair)]


def _to_floats(value: list[Any], name: str) -> Floats:
    """Return lists of numbers as float32; beyond it, they become infinite.

    In pieces, as NumPy lets no other thread run before it has converted a whole list. Each element
    is checked first: of numbers and one string of 1000 characters, NumPy makes strings of 4 kB.
    """
    shape: tuple[int, ...] = (len(value),)
    elements: Iterable[Any] = value
    if value and isinstance(value[0], list):
        _check_rows(value, name)
        shape, elements = (len(value), len(value[0])), chain.from_iterable(value)
    floats = np.empty(shape, np.float32)
    left, at = iter(elements), 0
    while piece := list(islice(left, _PIECE_NUMBERS)):
        _check_numbers(piece, name, at, shape)
        to_float32(_to_array(piece), floats.reshape(-1)[at : at + len(piece)])
        at += len(piece)
    return floats


def _to_array(numbers: list[int | float]) -> Array:
    """Return numbers in a dtype that has them all; integers beyond float64 become infinite."""
    array: Array = np.array(numbers)
    if array.dtype.kind in "fiu":
        return array
    most = 10**308
    doubles = [
        one if isinstance(one, float) or abs(one) <= most else math.inf if one > 0 else -math.inf
        for one in numbers
    ]
    return np.array(doubles, np.float64)


def _check_rows(value: list[Any], name: str) -> None:
    """Raise for the first row that is not a list, or differs in length from row 0."""
    for index, row in enumerate(value):
        if not isinstance(row, list):
            raise InvalidRequestError(
                f"{name}[{index}] is {_kind(row)}, but {name}[0] is a list; send a list of "
                "numbers, or a list of such lists",
                field=name,
                row=index,
            )
        if len(row) != len(value[0]):
            raise RaggedInputError(
                f"row {index} of {name!r} has {counted(len(row), 'number')}, but row 0 has "
                f"{len(value[0])}; send rows of equal length",
                field=name,
                row=index,
                got=len(row),
                expected=len(value[0]),
            )


def _check_numbers(values: list[Any], name: str, start: int, shape: tuple[int, ...]) -> None:
    """Raise for the first of `values`, which are at `start` of a tensor, that is not a number."""
    if others := set(map(type, values)) - {int, float}:
        kinds = list(map(type, values))
        place = min(map(kinds.index, others))
        where = name + "".join(f"[{one}]" for one in np.unravel_index(start + place, shape))
        raise InvalidRequestError(
            f"{where} is {_kind(values[place])}; expected a number", field=where
        )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
