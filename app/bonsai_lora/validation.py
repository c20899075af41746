"""How errors say what is wrong with a value without showing a secret; imports nothing else here."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

_EXPECTED = {
    "missing": "it is missing; add it",
    "extra_forbidden": "it is unknown; remove it",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "int_parsing": "expected an integer",
    "int_parsing_size": "expected a shorter integer",
    "int_type": "expected an integer",
    "int_from_float": "expected an integer",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected a string",
    "list_type": "expected a list",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "literal_error": "expected {expected}",
    "union_tag_invalid": "{discriminator} is '{tag}'; expected one of {expected_tags}",
    "greater_than_equal": "expected {ge} or more",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected {le} or less",
    "less_than": "expected less than {lt}",
    "string_too_short": "expected a length of {min_length} or more",
    "string_too_long": "expected a length of {max_length} or less",
    "string_pattern_mismatch": "expected text that matches {pattern}",
    "too_short": "expected a list of {min_length} or more",
    "too_long": "expected a list of {max_length} or fewer",
}
"""By the type of pydantic's error."""


class _Json(reprlib.Repr):
    """Shortens values as reprlib does, with JSON's words."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Return the first fields; reprlib would sort all of them."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: ARG002, N802 - named by type
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:  # noqa: ARG002, FBT001
        return "true" if value else "false"


as_written = _Json().repr
"""Return a JSON value as an error shows it, as it was written but not at any length."""

_SECRETS = re.compile(r"(?<=:).*(?=@)|(?<=\?).*", re.DOTALL)
_CREDENTIAL = re.compile("[!-~]+")


def without_secrets(url: str) -> str:
    """Return a URL, or what should be one, without the password and query that it may have."""
    return _SECRETS.sub("...", url)


def shown(value: Any) -> str:
    """Return a value as an error shows it, without what may be a secret."""
    if isinstance(value, str):
        return repr(without_secrets(value))
    return as_written(value)


def check_credential(what: str, text: str) -> str:
    """Return a key or token that a header can carry; `what` names it in the error, which hides it.

    Raises ValueError.
    """
    if not _CREDENTIAL.fullmatch(text):
        raise ValueError(
            f"{what} has a space, a line end or a character beyond ASCII; pass the key as it was "
            "given out, and nothing else"
        )
    return text


def expectation(error: Mapping[str, Any]) -> str:
    """Return what one of pydantic's errors says of a value, or what was expected instead."""
    text = _EXPECTED.get(error["type"])
    if text is None:
        found: str = error["msg"].removeprefix("Value error, ")
        return re.sub(r"^\w+ should ", "it should ", found)
    limits = error.get("ctx", {})
    return text.format_map({key: _number_or_text(value) for key, value in limits.items()})


_NO_VALUE = ("missing", "extra_forbidden", "json_invalid", "value_error", "union_tag_invalid")
"""Faults that are not of a single value, or that name it."""


def fault_in_file(error: Any, *, tags: Sequence[str] = (), has_secrets: bool = False) -> str:
    """Return where in a file the first fault of a ValidationError is, and what was expected.

    `tags` are the values by which pydantic chose a model, which are no part of the place. Of a file
    that may have secrets, no value is shown.
    """
    first = error.errors(include_url=False)[0]
    names = [f"[{one}]" if isinstance(one, int) else f".{one}" for one in first["loc"]]
    place = "".join(name for name in names if name[1:] not in tags).removeprefix(".")
    is_value = first["type"] not in _NO_VALUE and isinstance(first["input"], str | int | float)
    found = f" is {shown(first['input'])};" if is_value and not has_secrets else ":"
    return f"{place or 'the file'}{found} {expectation(first)}"


def _number_or_text(value: Any) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)
