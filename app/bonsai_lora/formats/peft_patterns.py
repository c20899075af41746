r"""rank_pattern and alpha_pattern: which module gets which value, matched as peft matches.

peft puts each key, as a regular expression, into `(.*\.)?(key)$`, and the first key that matches a
module's path wins (get_pattern_key in peft 0.21, src/peft/utils/other.py). Names and alternations
of names are looked up in tables; other expressions go to RE2, whose time is linear in text and
program. Nothing here looks at a clock: the work is counted, so the same file always gets the same
answer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import re2

from bonsai_lora.errors import InvalidAdapterError

MATCH_STEPS = 1_000_000_000
"""Most steps (instructions of a program times characters) for one adapter: at worst 3 s."""
STEPS_PER_LOOKUP = 400
"""What a match costs besides, and a look-up."""
_STEPS_PER_PROGRAM = 100_000
"""What making a program costs besides."""
_PROGRAM_BYTES = 1 << 20

T = TypeVar("T")

_LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_.\-]|\\[.\-])*\$?")
# What RE2 takes for something else than `re` does, or `re` does not take at all.
_NOT_THE_SAME = re.compile(
    r"\{,|\[:|\[\[|--|&&|~~|\\[CQEpPz]|\(\?[A-Za-z-]*\)|\(\?[A-Za-z]*U|\(\?<[^=!]"
)
_INEXPRESSIBLE = ("invalid perl operator", "invalid escape", "bad repetition", "repetition size")


@dataclass(slots=True)
class Steps:
    """The work that all patterns of one adapter may still cost."""

    left: int = MATCH_STEPS

    def take(self, steps: int, name: str) -> None:
        """Count `steps`; raises InvalidAdapterError where they are more than are left."""
        self.left -= steps
        if self.left < 0:
            raise InvalidAdapterError(
                f"{name} has so many or such large expressions that matching them against all "
                "modules is refused; write module names instead",
                field=name,
            )


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """What a module may get: its value, unless an earlier key matches that cannot be matched."""

    value: T
    uncertain: tuple[T, ...] = ()
    """Values of keys that RE2 cannot express and that might win."""
    keys: tuple[str, ...] = ()
    """Those keys."""

    def values(self) -> tuple[T, ...]:
        """Return all values that the module may get."""
        return (*self.uncertain, self.value)


def choose(
    name: str, patterns: Mapping[str, T], modules: Iterable[str], default: T, steps: Steps
) -> dict[str, Choice[T]]:
    """Return what each of `modules` gets from `patterns`, the field `name`, in peft's order.

    Raises InvalidAdapterError for a broken expression, and over the limit of `steps`.
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


@dataclass(frozen=True, slots=True)
class _Literal:
    """A key that is a name: a dot that is not escaped stands for any character."""

    text: str
    wild: tuple[int, ...]
    """Places of such dots."""
    anchored: bool
    """Whether it must be the whole path (`^`)."""


@dataclass(slots=True)
class _Table:
    """The keys that are names or alternations of names, and the numbers of the others."""

    keys: Sequence[str]
    others: list[int] = field(default_factory=list)
    _by_shape: dict[tuple[int, bool], dict[tuple[int, ...], dict[str, int]]] = field(
        default_factory=dict
    )
    """Length, whether anchored -> places of wild dots -> text -> number of the first such key."""

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
        """Return the number of the first key that matches, that of the default if none does."""
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
    """Return a key as a name, None where it is an expression."""
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
    return _Literal(_masked("".join(text), wild), tuple(wild), key.startswith("^"))


def _masked(text: str, wild: Sequence[int]) -> str:
    if not wild:
        return text
    letters = list(text)
    for place in wild:
        letters[place] = "."
    return "".join(letters)


def _compile(key: str, name: str, steps: Steps) -> "re2._Regexp | None":
    """Return a key as RE2 matches it, None where RE2 cannot express it."""
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
            f"{name} has the key {key[:200]!r}, which is no regular expression: {reason[:200]}",
            field=name,
        ) from None


def _reason(error: Exception) -> str:
    reason = error.args[0] if error.args else ""
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
