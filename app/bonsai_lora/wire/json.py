"""Tensors as JSON: nested lists of finite numbers, read and written without a loop over them."""

import json
import math
from collections.abc import Sequence
from functools import cached_property
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np
import orjson

from bonsai_lora.core.backend import find_lists, list_of
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.errors import (
    InvalidRequestError,
    MalformedJsonError,
    RaggedInputError,
)
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.finite import check_finite

_TENSOR_KEYS = frozenset({"inputs", "base_outputs", "data", "weights", "lora_A", "lora_B"})
"""Fields whose lists of numbers may become arrays as they are read."""

_SHORT_BYTES = 1 << 10
"""Below this, lists are as fast."""
_LEAST_NUMBERS = 64
"""Shorter lists stay lists."""
_HOLE = token_hex(8)
"""Stands where an array was taken out of a text, or is to be put in: nobody else can write it."""


def decode_object(body: Buffer, allowed: frozenset[str]) -> dict[str, Any]:
    """Return the JSON object `body`.

    Raises MalformedJsonError where it is not JSON, InvalidRequestError where it is not an object
    or has a field outside `allowed`.
    """
    hint = " (for safetensors, say so in Content-Type)" if body[8:9] == b"{" else ""
    value = decode_with_arrays(body, hint=hint)
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"the body must be a JSON object, got {_kind(value)}", expected=sorted(allowed)
        )
    unknown = sorted(value.keys() - allowed)
    if unknown:
        raise InvalidRequestError(
            f"unknown field {unknown[0][:100]!r}; known are {', '.join(sorted(allowed))}",
            got=[name[:100] for name in unknown[:8]],
            expected=sorted(allowed),
        )
    return value


def decode(body: Buffer, what: str = "the body", hint: str = "") -> Any:
    """Return the JSON value `body`; raises MalformedJsonError with `what` it is and a `hint`."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        found = _decode_more(body)
        if found is None:
            raise MalformedJsonError(f"{what} is not JSON{hint}: {error}") from None
        return found


def decode_with_arrays(body: Buffer, what: str = "the body", hint: str = "") -> Any:
    """Return the JSON value `body` as `decode` does, but tensors in it as float32 arrays.

    Those are lists of numbers, one or two deep and not ragged, in fields of _TENSOR_KEYS. Not all
    of them need become arrays: `decode_tensor` takes lists as well, and says what is wrong.
    """
    text, arrays = take_lists(body)
    if arrays:
        try:
            return _with_arrays(orjson.loads(text), arrays)
        except (ValueError, RecursionError):
            pass  # something is wrong or uncommon; read it the ordinary way
    return decode(body, what, hint)


class Taken(NamedTuple):
    """JSON text with holes, and what was there.

    Where a list was in a string, the text is no JSON: a hole's quote ends the string.
    """

    text: bytes
    arrays: Sequence[Floats]

    @property
    def form(self) -> tuple[Any, ...]:
        """All but the numbers."""
        return (self.text, *(one.shape for one in self.arrays))


def take_lists(body: Buffer) -> Taken:
    """Return JSON text with holes in the place of long lists of numbers, and those as arrays."""
    lists = find_lists(body, _LEAST_NUMBERS) if len(body) > _SHORT_BYTES else []
    parts: list[Buffer] = []
    at = 0
    for number, one in enumerate(lists):
        parts += (body[at : one.start], b'{"%b":%d}' % (_HOLE.encode(), number))
        at = one.end
    return Taken(b"".join([*parts, body[at:]]), [one.numbers for one in lists])


def hole_of(value: Any) -> int | None:
    """Return which list was in the place of a JSON value; None for no list."""
    return value.get(_HOLE) if isinstance(value, dict) else None


def _with_arrays(value: Any, arrays: Sequence[Floats], *, is_tensor: bool = False) -> Any:
    """Return a JSON value, filled in place; raises ValueError for a hole outside of tensors."""
    if isinstance(value, list):
        for place, one in enumerate(value):
            value[place] = _with_arrays(one, arrays)
    elif isinstance(value, dict):
        if _HOLE in value:
            if not is_tensor:
                raise ValueError
            return arrays[value[_HOLE]]
        for key, one in value.items():
            value[key] = _with_arrays(one, arrays, is_tensor=is_tensor or key in _TENSOR_KEYS)
    return value


def _decode_more(body: Buffer) -> Any:
    """Return what the standard library reads as JSON and orjson does not; None for nothing.

    NaN, Infinity and 1e400, which many programs write: the check for finite numbers can then say
    where they are. Not half surrogate pairs, which nothing can write again.
    """
    text = bytes(body)
    if rb"\ud" in text.lower():
        return None
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


class Text:
    """The text that values were read from, where it must be asked about booleans."""

    def __init__(self, body: Buffer) -> None:
        self.body = body

    @cached_property
    def may_hold_booleans(self) -> bool:
        """Whether a boolean may be among numbers, which NumPy would take for 0 or 1."""
        text = bytes(self.body)
        return b"true" in text or b"false" in text


def decode_tensor(value: Any, name: str, text: Text) -> Floats:
    """Return nested lists, or an array that was made of them, as float32 (width,) or (rows, width).

    `text` is what `value` was read from. Raises InvalidRequestError for anything but lists of
    numbers one or two deep, RaggedInputError for rows of different lengths, NonFiniteInputError for
    a number beyond float32.
    """
    if isinstance(value, np.ndarray):
        check_finite(value, name)
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"{name!r} must be a list of numbers or a list of such lists, got {_kind(value)}",
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
    """Return `value` as JSON in parts; float32 arrays in it (finite) as `list_of` writes them."""
    lists: list[Buffer] = []

    def take_out(array: Any) -> str:
        lists.append(list_of(array))
        return _HOLE

    text = orjson.dumps(value, default=take_out)
    first, *others = text.split(f'"{_HOLE}"'.encode())
    return [first, *(part for pair in zip(lists, others, strict=True) for part in pair)]


def _to_array(value: list[Any], name: str) -> Array:
    try:
        array: Array = np.array(value) if value else np.empty(0, np.float32)
    except ValueError:  # rows of different lengths, or lists beside numbers
        _check_rows(value, name)
        _check_elements(value, name)
        raise InvalidRequestError(
            f"{name!r} is nested too deep; expected one vector or a list of vectors", field=name
        ) from None
    except OverflowError:
        array = np.array(value, object)
    if array.dtype.kind not in "fiu":
        _check_elements(value, name)
        return array if array.ndim > 2 else _to_doubles(array)
    return array


def _to_doubles(array: Array) -> Array:
    """Return numbers, among them integers beyond float64, as float64: those become infinite."""
    most = 10**308
    doubles = [
        one if isinstance(one, float) or abs(one) <= most else math.inf if one > 0 else -math.inf
        for one in array.flat
    ]
    return np.array(doubles, np.float64).reshape(array.shape)


def _check_rows(value: list[Any], name: str) -> None:
    """Raise for the first row that is no list, or not as long as the first one."""
    lists = [index for index, row in enumerate(value) if isinstance(row, list)]
    if not lists:
        return
    if lists[0] > 0:
        raise InvalidRequestError(
            f"{name}[{lists[0]}] is a list, but {name}[0] is {_kind(value[0])}; give one list of "
            "numbers, or a list of lists of numbers",
            field=name,
            row=lists[0],
        )
    for index, row in enumerate(value):
        if not isinstance(row, list):
            raise InvalidRequestError(
                f"{name}[{index}] is {_kind(row)} among lists; "
                "a batch is a list of lists of numbers",
                field=name,
                row=index,
            )
        if len(row) != len(value[0]):
            raise RaggedInputError(
                f"row {index} of {name!r} has {len(row)} numbers, but row 0 has {len(value[0])}; "
                "all rows must have one length",
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
        elif not set(map(type, row)) <= {int, float}:
            is_deep = all(isinstance(element, list) for element in row)
            for column, element in enumerate(() if is_deep else row):
                _check_number(element, f"{name}[{index}][{column}]")


def _check_number(value: Any, where: str) -> None:
    if type(value) not in (int, float):
        raise InvalidRequestError(f"{where} is {_kind(value)}, expected a number", field=where)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
