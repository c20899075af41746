"""Find the base tensors that the module paths of an adapter mean.

An adapter uses the paths of the class it was trained with, the base those of the class that saved
it: the same layer is `layers.0…` in a bare model, `model.layers.0…` in a causal one, and
`model.language_model.layers.0…` next to a vision tower. A path with a layer number means exactly
one tensor, which is never guessed.
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
"""Prefixes that transformers classes give the layers of a language model."""

_PREFIX_OF_TYPE = {
    "camembert": "roberta",
    "deberta-v2": "deberta",
    "xlm-roberta": "roberta",
    "xlm-roberta-xl": "roberta",
    "xmod": "roberta",
}
"""base_model_prefix of the model types whose prefix is not their name (transformers 5)."""

_RENAMED = (
    (".mlp.router.", ".block_sparse_moe.gate."),
    (".mlp.", ".block_sparse_moe."),
    (".experts.gate_up_proj", ".input_linear.weight"),
    (".experts.down_proj", ".output_linear.weight"),
)
"""Names in the classes of transformers 5 -> names in the checkpoints of Mixtral, Phi-3.5-MoE and
Granite (src/transformers/conversion_mapping.py)."""

_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.)")


def prefixes_of(model_type: str) -> tuple[str, ...]:
    """Return the prefixes that the layers of a base with this `model_type` may have."""
    own = _PREFIX_OF_TYPE.get(model_type, model_type.replace("-", "_"))
    return (*PREFIXES, f"{own}.") if own else PREFIXES


@dataclass(frozen=True, eq=False)
class TensorPaths:
    """The tensor names of a base, searchable by the module paths of adapters."""

    base: str
    """Name of the base, for error messages."""
    names: Collection[str]
    prefixes: Sequence[str]

    def find(self, parameter: str, match: str | None = None) -> Sequence[str]:
        """Return the tensors that `parameter`, such as `layers.0.mlp.up_proj.weight`, means.

        That is at most one, or one per layer for a parameter without a layer number. The exact name
        takes precedence, then names with a known prefix, then names that end with it; then the same
        for its older names. `match` limits the result to names that start with it, if any do.
        Raises InvalidRequestError if several tensors remain.
        """
        older = (parameter.replace(new, old) for new, old in _RENAMED if new in parameter)
        names = (self._find(one, match) for one in (parameter, *older))
        return next(filter(None, names), ())

    def _find(self, parameter: str, match: str | None) -> Sequence[str]:
        if match is None and parameter in self.names:
            return (parameter,)
        known = sorted({one for one in self._with_prefixes(parameter) if one in self.names})
        ending = self._by_ending.get(f".{parameter}", ())
        if match is not None:
            every = dict.fromkeys([*known, *ending])
            meant = [name for name in every if name.startswith(match)]
            if not meant:
                return self._find(parameter, None)
            return self._one(parameter, meant)
        return self._one(parameter, known or ending)

    def find_one(self, parameter: str, match: str | None = None) -> str | None:
        """Return the tensor that `parameter` means; None if no tensor does.

        Raises InvalidRequestError if several do.
        """
        names = self.find(parameter, match)
        if len(names) > 1:
            raise self._ambiguous(parameter, names)
        return names[0] if names else None

    def check_match(self, match: str) -> None:
        """Raise InvalidRequestError if no tensor name starts with `match`."""
        if not any(name.startswith(match) for name in self.names):
            raise InvalidRequestError(
                f"match is {match[:200]!r}, but no tensor of base {self.base!r} starts with it; "
                f"expected a prefix such as {', '.join(sorted(self._heads)[:8])}",
                field="match",
            )

    def _with_prefixes(self, parameter: str) -> Iterator[str]:
        cores = [parameter, *(parameter.removeprefix(one) for one in self.prefixes)]
        for core in dict.fromkeys(cores):
            yield core
            for prefix in self.prefixes:
                yield prefix + core

    def _one(self, parameter: str, names: Sequence[str]) -> Sequence[str]:
        """Return `names` if they are one tensor, or one per layer for a path without a number."""
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
        """Return whether a head such as `model.layers` consists of a known prefix and one part."""
        return head.rpartition(".")[0] in ("", *(one.removesuffix(".") for one in self.prefixes))

    def _ambiguous(self, parameter: str, names: Sequence[str]) -> InvalidRequestError:
        return InvalidRequestError(
            f"{parameter.removesuffix('.weight')!r} could mean {len(names)} tensors of base "
            f"{self.base!r}: {', '.join(names[:8])}; choose one with ?match= and a prefix of its "
            "name",
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
    """Return a name up to its first number; the whole name if it has no number."""
    number = _NUMBER.search(name)
    return name if number is None else name[: number.start()]
