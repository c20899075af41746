"""Tensors as JSON: nested lists of finite numbers, parsed and written in bulk."""

import json
import math
from collections.abc import Sequence
from functools import cached_property
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
    unknown = sorted(value.keys() - allowed)
    if unknown:
        raise InvalidRequestError(
            f"unknown field {unknown[0][:100]!r}; expected {one_of(sorted(allowed))}",
            got=[name[:100] for name in unknown[:8]],
            expected=sorted(allowed),
        )
    return value


def decode(body: Buffer, what: str = "the body", hint: str = "") -> Any:
    """Return the JSON value `body`.

    Raises MalformedJsonError, whose text calls the value `what` and ends with `hint`.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
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
            return _with_arrays(orjson.loads(text), arrays)
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
    parts: list[Buffer] = []
    at = 0
    for number, one in enumerate(lists):
        parts += (body[at : one.start], b'{"%b":%d}' % (_PLACEHOLDER.encode(), number))
        at = one.end
    return b"".join([*parts, body[at:]]), [one.numbers for one in lists]


def _with_arrays(value: Any, arrays: Sequence[Floats], *, is_tensor: bool = False) -> Any:
    """Replace placeholders by their arrays, in place; raises ValueError for one not in a tensor."""
    if isinstance(value, list):
        for place, one in enumerate(value):
            value[place] = _with_arrays(one, arrays)
    elif isinstance(value, dict):
        if _PLACEHOLDER in value:
            if not is_tensor:
                raise ValueError
            return arrays[value[_PLACEHOLDER]]
        for key, one in value.items():
            value[key] = _with_arrays(one, arrays, is_tensor=is_tensor or key in _TENSOR_KEYS)
    return value


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


class Text:
    """The JSON text that values were parsed from."""

    def __init__(self, body: Buffer) -> None:
        self.body = body

    @cached_property
    def may_hold_booleans(self) -> bool:
        """Whether booleans may be among the numbers; NumPy would convert them to 0 and 1."""
        text = bytes(self.body)
        return b"true" in text or b"false" in text


def decode_tensor(value: Any, name: str, text: Text) -> Floats:
    """Return nested lists, or an array parsed from them, as float32 (width,) or (rows, width).

    `text` is the JSON that `value` was parsed from. Raises InvalidRequestError for anything but
    lists of numbers one or two deep, RaggedInputError for rows of different lengths,
    NonFiniteInputError for a number beyond float32.
    """
    if isinstance(value, np.ndarray):
        check_finite(value, name)
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"{name!r} is {_kind(value)}; expected a list of numbers, or a list of such lists",
            field=name,
        )
    if text.may_hold_booleans:
        _check_elements(value, name)
    array = _to_array(value, name)
    if array.ndim > 2:
        raise InvalidRequestError(
            f"{name!r} is nested {array.ndim} deep; expected one vector or a list of vectors",
            field=name,
        )
    floats = to_float32(array)
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


def _to_array(value: list[Any], name: str) -> Array:
    try:
        array: Array = np.array(value) if value else np.empty(0, np.float32)
    except ValueError:  # rows of different lengths, or a mix of lists and numbers
        _check_rows(value, name)
        _check_elements(value, name)
        raise InvalidRequestError(
            f"{name!r} is nested too deep; expected one vector or a list of vectors", field=name
        ) from None
    if array.dtype.kind not in "fiu":
        _check_elements(value, name)
        return array if array.ndim > 2 else _to_doubles(array)
    return array


def _to_doubles(array: Array) -> Array:
    """Return numbers as float64; integers beyond float64 become infinite."""
    most = 10**308
    doubles = [
        one if isinstance(one, float) or abs(one) <= most else math.inf if one > 0 else -math.inf
        for one in array.flat
    ]
    return np.array(doubles, np.float64).reshape(array.shape)


def _check_rows(value: list[Any], name: str) -> None:
    """Raise for the first row that is not a list, or differs in length from row 0."""
    lists = [index for index, row in enumerate(value) if isinstance(row, list)]
    if not lists:
        return
    if lists[0] > 0:
        raise InvalidRequestError(
            f"{name}[{lists[0]}] is a list, but {name}[0] is {_kind(value[0])}; send a list of "
            "numbers, or a list of such lists",
            field=name,
            row=lists[0],
        )
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


def _check_elements(value: list[Any], name: str) -> None:
    """Raise for the first element, one or two deep, that is not a number."""
    for index, row in enumerate(value):
        if not isinstance(row, list):
            _check_number(row, f"{name}[{index}]")
        elif others := set(map(type, row)) - {int, float}:
            if set(map(type, row)) == {list}:
                continue
            kinds = list(map(type, row))
            column = min(map(kinds.index, others))
            _check_number(row[column], f"{name}[{index}][{column}]")


def _check_number(value: Any, where: str) -> None:
    if type(value) not in (int, float):
        raise InvalidRequestError(f"{where} is {_kind(value)}; expected a number", field=where)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
