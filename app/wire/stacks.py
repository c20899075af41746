"""Which sets a row goes through, and at which weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.core.cast import Floats
from app.errors import InvalidRequestError, ShapeMismatchError
from app.wire import json

SETS = "sets"

MAX_STACK = 32
"""Most sets on one row."""

Stack = tuple[tuple[str, float], ...]
"""Sets with their weights; empty: no adapter."""

_MAX = float(np.finfo(np.float32).max)


def decode_metadata(metadata: Mapping[str, str]) -> Any:
    """Return what `sets` in safetensors metadata says; None where it is absent."""
    text = metadata.get(SETS)
    return None if text is None else json.decode(text.encode())


def check_rows(stacks: Sequence[Stack], inputs: Floats) -> None:
    """Raise ShapeMismatchError unless there is one stack per row of `inputs`."""
    rows = 1 if inputs.ndim == 1 else len(inputs)
    if len(stacks) != rows:
        raise ShapeMismatchError(
            f"'sets' has {len(stacks)} entries, but 'inputs' has {rows} rows; give one per row "
            "(null for no adapter)",
            field=SETS,
            got=len(stacks),
            expected=rows,
        )


def decode_row(value: Any, where: str) -> Stack:
    """Return the stack of one row: from a set's name, null, or a list of weighted sets.

    Raises InvalidRequestError, naming `where`, for anything else.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return ((value, 1.0),)
    return decode_stack(value, where)


def decode_stack(value: Any, where: str) -> Stack:
    """Return the stack of a list of names and `{"set", "weight"}` objects (weight 1 by default).

    Raises InvalidRequestError for anything else, for a weight that is no finite number, for a set
    named twice, and for more than MAX_STACK sets.
    """
    if not isinstance(value, list) or len(value) > MAX_STACK:
        raise InvalidRequestError(
            f"{where} must be a set's name, null, or a list of at most {MAX_STACK} objects "
            '{"set": name, "weight": number}',
            field=where,
        )
    stack = tuple(_decode_weighted(one, f"{where}[{number}]") for number, one in enumerate(value))
    if len({name for name, _ in stack}) != len(stack):
        raise InvalidRequestError(f"{where} names a set twice; give it one weight", field=where)
    return stack


def _decode_weighted(value: Any, where: str) -> tuple[str, float]:
    if isinstance(value, str):
        return value, 1.0
    if not isinstance(value, dict) or not {"set"} <= value.keys() <= {"set", "weight"}:
        raise InvalidRequestError(
            f'{where} must be a set\'s name or {{"set": name, "weight": number}}', field=where
        )
    name, weight = value["set"], value.get("weight", 1.0)
    if not isinstance(name, str):
        raise InvalidRequestError(f"{where}.set must be a set's name", field=where)
    return name, decode_weight(weight, f"{where}.weight")


def decode_weight(value: Any, where: str) -> float:
    """Return a number that is finite as a float32; raises InvalidRequestError for others."""
    if type(value) not in (int, float) or not abs(value) <= _MAX:
        raise InvalidRequestError(f"{where} must be a finite number", field=where)
    return float(value)
