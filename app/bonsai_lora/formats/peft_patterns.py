r"""Match rank_pattern and alpha_pattern against module paths, with the results of peft.

peft inserts each key, a regular expression, into `(.*\.)?(key)$`, and the first key that matches a
module's path wins (get_pattern_key in peft 0.21, src/peft/utils/other.py). Names and alternations
of names are looked up in tables; other expressions are matched by RE2, in time linear in text and
program. The work is limited by counted steps, not by time, so a file always gets the same result.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import re2

from bonsai_lora.errors import InvalidAdapterError

MATCH_STEPS = 1_000_000_000
"""Limit on the steps (program instructions times characters) of one adapter; at most 3 s."""
STEPS_PER_LOOKUP = 400
"""Steps charged for a lookup, and in addition for each match."""
_STEPS_PER_PROGRAM = 100_000
"""Steps charged in addition for compiling a program."""
_PROGRAM_BYTES = 1 << 20
_MOST_SHAPES = 64
"""Limit on the arrangements of dots that are compared per path length; models have few."""

T = TypeVar("T")

_LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_.\-]|\\[.\-])*\$?")
# Syntax that RE2 reads differently from `re`, or that `re` rejects.
_NOT_THE_SAME = re.compile(
    r"\{,|\[:|\[\[|--|&&|~~|\\[CQEpPz]|\(\?[A-Za-z-]*\)|\(\?[A-Za-z]*U|\(\?<[^=!]"
)
_INEXPRESSIBLE = ("invalid perl operator", "invalid escape", "bad repetition", "repetition size")


@dataclass(slots=True)
class Steps:
    """The budget of steps left for all patterns of one adapter."""

    left: int = MATCH_STEPS

    def take(self, steps: int, name: str) -> None:
        """Charge `steps`; raises InvalidAdapterError if the budget is exceeded."""
        self.left -= steps
        if self.left < 0:
            raise InvalidAdapterError(
                f"{name} has too many or too large expressions to match against all modules; list "
                "module names instead",
                field=name,
            )


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """The value of a module, and values of earlier keys that RE2 cannot express."""

    value: T
    uncertain: tuple[T, ...] = ()
    """Different values of earlier keys that might match."""
    keys: tuple[str, ...] = ()
    """Those keys."""

    def values(self) -> tuple[T, ...]:
        """Return all values that the module may have."""
        return (*self.uncertain, self.value)


def choose(
    name: str, patterns: Mapping[str, T], modules: Iterable[str], default: T, steps: Steps
) -> dict[str, Choice[T]]:
    """Return the value of each of `modules` by `patterns`, the field `name`; the first key wins.

    Raises InvalidAdapterError for an invalid expression, and if `steps` are exceeded.
    """
    if not patterns:
        return dict.fromkeys(modules, Choice(default))
    keys = list(patterns)
    table = _Table(keys)
    winners = {module: table.first(module, steps, name) for module in modules}
    uncertain: dict[str, list[int]] = {}
    for number in table.others:
        expression = _compile(keys[number], name, steps)
        candidates = [module for module, winner in winners.items() if winner > number]
        if expression is None:
            for module in candidates:
                uncertain.setdefault(module, []).append(number)
            continue
        for module in candidates:
            steps.take(expression.programsize * len(module) + STEPS_PER_LOOKUP, name)
            if expression.match(module):
                winners[module] = number
    values = [*patterns.values(), default]
    return {
        module: _choice(keys, values, winner, uncertain.get(module, []))
        for module, winner in winners.items()
    }


def _choice(
    keys: Sequence[str], values: Sequence[T], winner: int, uncertain: Sequence[int]
) -> Choice[T]:
    earlier = [
        number for number in uncertain if number < winner and values[number] != values[winner]
    ]
    return Choice(
        values[winner],
        tuple(values[number] for number in earlier),
        tuple(keys[number] for number in earlier),
    )


def keys_of(modules: Collection[str]) -> dict[str, str]:
    """Return a key for each of `modules` that matches no other of them.

    The key is the path itself, which all versions of peft look up, or an anchored expression where
    the path, as an expression, would match another module as well.
    """
    shapes: dict[int, dict[tuple[int, ...], set[str]]] = {}
    for module in modules:
        dots = tuple(place for place, letter in enumerate(module) if letter == ".")
        shapes.setdefault(len(module), {}).setdefault(dots, set()).add(module)
    shared: set[str] = set()
    for module in modules:
        for start in _starts(module):
            ending = module[start:]
            by_dots = shapes.get(len(ending), {})
            if len(by_dots) > _MOST_SHAPES:
                shared.update(*by_dots.values())
                shapes[len(ending)] = {}
                continue
            matching = (_masked(ending, dots) for dots in by_dots)
            found = {
                text for text, own in zip(matching, by_dots.values(), strict=True) if text in own
            }
            shared |= found - {module}
    return {module: f"^{re.escape(module)}" if module in shared else module for module in modules}


@dataclass(frozen=True, slots=True)
class _Literal:
    """A key that is a name, in which an unescaped dot matches any character."""

    text: str
    wild: tuple[int, ...]
    """Positions of unescaped dots."""
    anchored: bool
    """Whether it must match the whole path (`^`)."""


@dataclass(slots=True)
class _Table:
    """A lookup table of the keys that are names or alternations of names."""

    keys: Sequence[str]
    others: list[int] = field(default_factory=list)
    _by_shape: dict[tuple[int, bool], dict[tuple[int, ...], dict[str, int]]] = field(
        default_factory=dict
    )
    """(Length, anchored) -> positions of dots -> text -> number of the first such key."""

    def __post_init__(self) -> None:
        for number, key in enumerate(self.keys):
            literals = [_literal(part) for part in key.split("|")]
            if any(one is None for one in literals):
                self.others.append(number)
                continue
            for one in literals:
                assert one is not None
                shapes = self._by_shape.setdefault((len(one.text), one.anchored), {})
                shapes.setdefault(one.wild, {}).setdefault(one.text, number)

    def first(self, module: str, steps: Steps, name: str) -> int:
        """Return the number of the first matching key; the number of keys if none matches."""
        found = len(self.keys)
        for start in _starts(module):
            ending = module[start:]
            for anchored in (False, True) if start == 0 else (False,):
                shapes = self._by_shape.get((len(ending), anchored), {})
                steps.take(len(shapes) * STEPS_PER_LOOKUP, name)
                for wild, texts in shapes.items():
                    found = min(found, texts.get(_masked(ending, wild), found))
        return found


def _starts(module: str) -> Iterator[int]:
    yield 0
    for place, letter in enumerate(module):
        if letter == ".":
            yield place + 1


def _literal(key: str) -> _Literal | None:
    """Return a key as a name; None if it is an expression."""
    if not _LITERAL.fullmatch(key):
        return None
    body = key.removeprefix("^").removesuffix("$")
    text: list[str] = []
    wild: list[int] = []
    escaped = False
    for letter in body:
        if letter == "\\" and not escaped:
            escaped = True
            continue
        if letter == "." and not escaped:
            wild.append(len(text))
        text.append(letter)
        escaped = False
    return _Literal("".join(text), tuple(wild), key.startswith("^"))


def _masked(text: str, wild: Sequence[int]) -> str:
    if not wild:
        return text
    letters = list(text)
    for place in wild:
        letters[place] = "."
    return "".join(letters)


def _compile(key: str, name: str, steps: Steps) -> "re2._Regexp | None":
    """Return a key compiled by RE2; None if RE2 cannot express it."""
    steps.take(_STEPS_PER_PROGRAM + len(key) * STEPS_PER_LOOKUP, name)
    if _NOT_THE_SAME.search(key):
        return None
    options = re2.Options()
    options.max_mem = _PROGRAM_BYTES
    options.log_errors = False
    options.never_capture = True
    try:
        return re2.compile(rf"(.*\.)?({key})$", options)
    except re2.error as error:
        reason = _reason(error)
        if reason.startswith(_INEXPRESSIBLE) or "repetition size" in reason:
            return None
        raise InvalidAdapterError(
            f"{name} has the key {key[:200]!r}, which is not a valid regular "
            f"expression: {reason[:200]}; correct it",
            field=name,
        ) from None


def _reason(error: Exception) -> str:
    reason = error.args[0] if error.args else ""
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
