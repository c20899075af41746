"""Which sets a row goes through, and at which weight."""

from collections.abc import Mapping, Sequence
from typing import Any

from bonsai_lora.core.cast import Floats, count_rows
from bonsai_lora.errors import InvalidRequestError, ShapeMismatchError
from bonsai_lora.wire import json

SETS = "sets"

MAX_STACK = 32
"""Most sets on one row."""

Stack = tuple[tuple[str, float], ...]
"""Sets with their weights; empty: no adapter."""

MAX_SCALE = 1e6
"""Largest weight of a set, and largest scale of a request: no product overflows float32."""


def sets_of_metadata(metadata: Mapping[str, str]) -> Any:
    """Return what `sets` in safetensors metadata says; None where it is absent."""
    text = metadata.get(SETS)
    where = f'the metadata {SETS!r} (such as ["my-adapter", null])'
    return None if text is None else json.decode(text.encode(), where)


def check_rows(sets: Sequence[Any], inputs: Floats) -> None:
    """Raise ShapeMismatchError unless there is one entry per row of `inputs`."""
    rows = count_rows(inputs)
    if len(sets) != rows:
        raise ShapeMismatchError(
            f"the length of 'sets' is {len(sets)}, but 'inputs' is a batch of {rows}; give one "
            "entry per row (null for no adapter)",
            field=SETS,
            got=len(sets),
            expected=rows,
        )


def decode_row(value: Any, where: str) -> Stack:
    """Return the stack of one row: from a set's name, null, a weighted set, or a list of these.

    Raises InvalidRequestError, naming `where`, for anything else.
    """
    if value is None:
        return ()
    if isinstance(value, str | dict):
        return (_decode_weighted(value, where),)
    return decode_stack(value, where)


def decode_stack(value: Any, where: str) -> Stack:
    """Return the stack of a list of names and `{"set", "weight"}` objects (weight 1 by default).

    Raises InvalidRequestError for anything else, for a weight that is no finite number, for a set
    named twice, and for more than MAX_STACK sets.
    """
    if not isinstance(value, list) or len(value) > MAX_STACK:
        raise InvalidRequestError(
            f"{where} must be a list of at most {MAX_STACK} objects "
            '{"set": name, "weight": number}, or sets\' names',
            field=where,
        )
    stack = tuple(_decode_weighted(one, f"{where}[{number}]") for number, one in enumerate(value))
    if len({name for name, _ in stack}) != len(stack):
        raise InvalidRequestError(f"{where} names a set twice; give it one weight", field=where)
    return stack


def _decode_weighted(value: Any, where: str) -> tuple[str, float]:
    if isinstance(value, str):
        return value, 1.0
    if not isinstance(value, dict) or "set" not in value:
        raise InvalidRequestError(
            f'{where} must be a set\'s name or {{"set": name, "weight": number}}', field=where
        )
    unknown = sorted(value.keys() - {"set", "weight"})
    if unknown:
        raise InvalidRequestError(
            f"{where} has the unknown field {unknown[0][:100]!r}; known are 'set' and 'weight'",
            field=where,
        )
    name, weight = value["set"], value.get("weight", 1.0)
    if not isinstance(name, str):
        raise InvalidRequestError(f"{where}.set must be a set's name", field=where)
    return name, decode_weight(weight, f"{where}.weight")


def decode_weight(value: Any, where: str) -> float:
    """Return a number of at most MAX_SCALE either way; raises InvalidRequestError for others."""
    if type(value) not in (int, float) or not abs(value) <= MAX_SCALE:
        raise InvalidRequestError(
            f"{where} must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}, got {value!r:.100}",
            field=where,
        )
    return float(value)
