"""Stacks: the sets that apply to a row, with their weights."""

from collections.abc import Mapping
from typing import Any

from bonsai_lora.errors import InvalidRequestError
from bonsai_lora.validation import as_written
from bonsai_lora.wire import json

SETS = "sets"

_MOST_COMMAS = 1 << 20

MAX_STACK = 32
"""Most sets per row."""

Stack = tuple[tuple[str, float], ...]
"""Names of sets with their weights; empty for no adapter."""

MAX_SCALE = 1e6
"""Largest weight of a set and largest scale of a request, so that no product overflows float32."""


def sets_of_metadata(metadata: Mapping[str, str]) -> Any:
    """Return the parsed `sets` of safetensors metadata; None if it is missing."""
    if SETS not in metadata:
        return None
    text = metadata[SETS].encode()
    where = f'the metadata {SETS!r} (such as ["my-adapter", null])'
    json.check_lists(text, where)
    if text.count(b",") > _MOST_COMMAS:
        raise InvalidRequestError(
            f"{where} has {text.count(b',')} commas, but the limit is {_MOST_COMMAS}; send fewer "
            "rows at once"
        )
    return json.decode(text, where)


def decode_row(value: Any, where: str) -> Stack:
    """Return the stack of one row, given as a name, null, a weighted set, or a list of these.

    Raises InvalidRequestError for anything else; `where` names the value in its text.
    """
    if value is None:
        return ()
    if isinstance(value, str | dict):
        return (_decode_weighted(value, where),)
    return decode_stack(value, where)


def decode_stack(value: Any, where: str) -> Stack:
    """Return the stack given as a list of names and `{"set", "weight"}` objects (default: 1).

    Raises InvalidRequestError for anything else, a weight that is not finite, a set named twice,
    or more than MAX_STACK sets.
    """
    if not isinstance(value, list) or len(value) > MAX_STACK:
        raise InvalidRequestError(
            f"{where} is {as_written(value)}; expected a list of at most {MAX_STACK} objects "
            '{"set": name, "weight": number}, or names of sets',
            field=where,
        )
    stack = tuple(_decode_weighted(one, f"{where}[{number}]") for number, one in enumerate(value))
    if len({name for name, _ in stack}) != len(stack):
        raise InvalidRequestError(
            f"{where} names a set twice; name it once, with one weight", field=where
        )
    return stack


def _decode_weighted(value: Any, where: str) -> tuple[str, float]:
    if isinstance(value, str):
        return value, 1.0
    if not isinstance(value, dict) or "set" not in value:
        raise InvalidRequestError(
            f"{where} is {as_written(value)}; expected the name of a set, or "
            '{"set": name, "weight": number}',
            field=where,
        )
    unknown = json.first_names(one for one in value if one not in ("set", "weight"))
    if unknown:
        raise InvalidRequestError(
            f"{where} has the unknown field {unknown[0][:100]!r}; expected 'set' and 'weight'",
            field=where,
        )
    name, weight = value["set"], value.get("weight", 1.0)
    if not isinstance(name, str):
        raise InvalidRequestError(
            f"{where}.set is {as_written(name)}; expected the name of a set", field=where
        )
    return name, decode_weight(weight, f"{where}.weight")


def decode_weight(value: Any, where: str) -> float:
    """Return a number from -MAX_SCALE to MAX_SCALE; raises InvalidRequestError for others."""
    if type(value) not in (int, float) or not abs(value) <= MAX_SCALE:
        raise InvalidRequestError(
            f"{where} is {as_written(value)}; expected a number from -{MAX_SCALE:g} to "
            f"{MAX_SCALE:g}",
            field=where,
        )
    return float(value)
