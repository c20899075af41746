"""Which tensors of a base a path in an adapter means.

An adapter's paths are those of the class that it was trained with, and the base's names those of
the class that saved it: the same layer is `layers.0…` of a bare model, `model.layers.0…` of a
causal one, `model.language_model.layers.0…` beside a vision tower. A path with a layer's number
means exactly one tensor; which one is never guessed.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bonsai_lora.errors import InvalidRequestError

PREFIXES = (
    "model.",
    "transformer.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
)
"""What classes of transformers put in front of the layers of a language model."""

_PREFIX_OF_TYPE = {
    "camembert": "roberta",
    "deberta-v2": "deberta",
    "xlm-roberta": "roberta",
    "xlm-roberta-xl": "roberta",
    "xmod": "roberta",
}
"""base_model_prefix of the types whose prefix is not their name (transformers 5)."""

_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.)")


def prefixes_of(model_type: str) -> tuple[str, ...]:
    """Return the prefixes that may stand before the layers of a base of this `model_type`."""
    own = _PREFIX_OF_TYPE.get(model_type, model_type.replace("-", "_"))
    return (*PREFIXES, f"{own}.") if own else PREFIXES


@dataclass(frozen=True, eq=False)
class TensorPaths:
    """The names of a base's tensors, to be found by the paths of adapters."""

    base: str
    """The base's name, for errors."""
    names: Collection[str]
    prefixes: Sequence[str]

    def find(self, parameter: str, match: str | None = None) -> Sequence[str]:
        """Return the tensors that `parameter` (such as `layers.0.mlp.up_proj.weight`) means.

        One at most, but all layers for a parameter without a layer's number. The exact name comes
        first, then the known prefixes, then names that end so. With `match` only names that start
        with it are meant, where there are any. Raises InvalidRequestError where several are left.
        """
        if match is None and parameter in self.names:
            return (parameter,)
        known = sorted({*self._with_prefixes(parameter)} & {*self.names})
        ending = self._by_ending.get(f".{parameter}", ())
        if match is not None:
            every = dict.fromkeys([*known, *ending])
            meant = [name for name in every if name.startswith(match)]
            if not meant:
                return self.find(parameter)
            return self._one(parameter, meant)
        return self._one(parameter, known or ending)

    def find_one(self, parameter: str, match: str | None = None) -> str | None:
        """Return the tensor that `parameter` means, None where there is none.

        Raises InvalidRequestError where it means several.
        """
        names = self.find(parameter, match)
        if len(names) > 1:
            raise self._ambiguous(parameter, names)
        return names[0] if names else None

    def check_match(self, match: str) -> None:
        """Raise InvalidRequestError where no tensor starts with `match`."""
        if not any(name.startswith(match) for name in self.names):
            raise InvalidRequestError(
                f"no tensor of base {self.base!r} starts with {match[:200]!r}; match chooses among "
                f"the tensors that a path could mean, such as {', '.join(sorted(self._heads)[:8])}",
                field="match",
            )

    def _with_prefixes(self, parameter: str) -> Iterator[str]:
        cores = [parameter, *(parameter.removeprefix(one) for one in self.prefixes)]
        for core in dict.fromkeys(cores):
            yield core
            for prefix in self.prefixes:
                yield prefix + core

    def _one(self, parameter: str, names: Sequence[str]) -> Sequence[str]:
        """Return `names` where they are one tensor, or one per layer for a path without a layer."""
        if len(names) < 2:
            return names
        if _NUMBER.search(parameter):
            raise self._ambiguous(parameter, names)
        towers = {_head(name) for name in names}
        if len(towers) > 1:
            towers = {one for one in towers if self._is_known(one)}
        if len(towers) != 1:
            raise self._ambiguous(parameter, names)
        return [name for name in names if _head(name) in towers]

    def _is_known(self, head: str) -> bool:
        """Return whether a head such as `model.layers` has nothing but a known prefix in front."""
        return head.rpartition(".")[0] in ("", *(one.removesuffix(".") for one in self.prefixes))

    def _ambiguous(self, parameter: str, names: Sequence[str]) -> InvalidRequestError:
        return InvalidRequestError(
            f"{parameter.removesuffix('.weight')!r} could mean {len(names)} tensors of base "
            f"{self.base!r}: {', '.join(names[:8])}; choose with ?match= and the start of a name",
            module=parameter.removesuffix(".weight"),
            base=self.base,
            candidates=list(names[:64]),
        )

    @cached_property
    def _heads(self) -> set[str]:
        return {_head(name) for name in self.names}

    @cached_property
    def _by_ending(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            for place, letter in enumerate(name):
                if letter == ".":
                    found.setdefault(name[place:], []).append(name)
        return found


def _head(name: str) -> str:
    """Return what stands before the first number in a name, the whole name where there is none."""
    number = _NUMBER.search(name)
    return name if number is None else name[: number.start()]
