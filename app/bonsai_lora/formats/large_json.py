"""Large JSON objects, read and written in pieces, so that other threads run in between.

The `json` module lets none run before it is done: 0.4 s for an object with a million names.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

_PIECE = 1024
"""Values read or written at a time."""
_VALUE_CHARACTERS = 1 << 12
"""Longest value that is neither a string nor read in pieces itself."""
_SPACE = re.compile(r"[ \t\n\r]*")
_LITERAL = re.compile(r"[^,}\]\s]{0,64}")
_CLOSING = {"{": "}", "[": "]"}


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def refuse_constant(text: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity: `parse_constant` of the json module."""
    raise ValueError(f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_pairs, parse_constant=refuse_constant)


class ObjectReader:
    """Reads a JSON object, `text`, from its beginning.

    All methods raise ValueError for what is not JSON, or longer than expected.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def names(self) -> Iterator[str]:
        """Yield each name of the object that begins here; call for its value in between."""
        self._expect("{")
        if self._next() != "}":
            while True:
                name = self._string()
                self._expect(":")
                yield name
                if self._next() == "}":
                    break
                self._expect(",")
        self._at += 1

    def is_at_object(self) -> bool:
        """Return whether an object begins here."""
        return self._next() == "{"

    def end(self) -> None:
        """Check that nothing follows."""
        if self._next():
            self._fail("the end")

    def value(self) -> Any:
        """Return the value that begins here: flat, and short unless it is a string."""
        first = self._next()
        if first == '"':
            return self._string()
        if first in _CLOSING:
            end = self._text.find(_CLOSING[first], self._at, self._at + _VALUE_CHARACTERS) + 1
        else:
            end = _LITERAL.match(self._text, self._at).end()  # type: ignore[union-attr]
        if end <= self._at:
            self._fail("a short value")
        found, self._at = self._decoded(_DECODER.decode, self._text[self._at : end]), end
        return found

    def any_value(self) -> Any:
        """Return the value that begins here, read as a whole."""
        self._next()
        found, self._at = self._decoded(_DECODER.raw_decode, self._text, self._at)
        return found

    def _decoded(self, decode: Callable[..., Any], *text: str | int) -> Any:
        try:
            return decode(*text)
        except RecursionError:
            self._fail("a value that is nested less deeply")

    def _string(self) -> str:
        self._expect('"')
        found: str
        found, self._at = scanstring(self._text, self._at, True)
        return found

    def _next(self) -> str:
        """Move on to the next character that is not white space, and return it."""
        self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
        return self._text[self._at : self._at + 1]

    def _expect(self, character: str) -> None:
        if self._next() != character:
            self._fail(repr(character))
        self._at += 1

    def _fail(self, what: str) -> NoReturn:
        raise ValueError(f"expected {what} at character {self._at}")


def dump(value: Any, **options: Any) -> str:
    """Return `json.dumps(value, **options)` of nested dicts and lists."""
    comma, colon = options.get("separators", (", ", ": "))
    if isinstance(value, Mapping) and len(value) <= _PIECE:
        pairs = (
            f"{json.dumps(name, **options)}{colon}{dump(one, **options)}"
            for name, one in value.items()
        )
        return f"{{{comma.join(pairs)}}}"
    if isinstance(value, Mapping):
        items = iter(value.items())
        pieces = iter(lambda: dict(islice(items, _PIECE)), {})
        return f"{{{comma.join(json.dumps(one, **options)[1:-1] for one in pieces)}}}"
    if isinstance(value, list) and len(value) > _PIECE:
        starts = range(0, len(value), _PIECE)
        parts = (json.dumps(value[at : at + _PIECE], **options)[1:-1] for at in starts)
        return f"[{comma.join(parts)}]"
    return json.dumps(value, **options)
