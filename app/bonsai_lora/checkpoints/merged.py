"""Merged models: a base, and what sets change of its tensors. Their files are in merged_files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bonsai_lora.checkpoints.base import Base, Tensor
from bonsai_lora.checkpoints.experts import expert_weights
from bonsai_lora.checkpoints.fit import check_not_empty, check_tensor
from bonsai_lora.checkpoints.merged_tensor import MergedTensor, TokenRows, Touched
from bonsai_lora.checkpoints.orientation import Fit, as_stored, is_any_transposed
from bonsai_lora.checkpoints.parts import digest_of
from bonsai_lora.checkpoints.ties import is_embedding, tied_adapters, tied_replacements
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import InvalidRequestError, UnsupportedAdapterError, counted
from bonsai_lora.formats.peft_keys import TOKEN_ROWS
from bonsai_lora.formats.peft_options import PLAIN, BaseOptions


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One set of a merged model, and the weight of its deltas."""

    lora_set: BonsaiLoraSet
    etag: str
    weight: float = 1.0
    options: BaseOptions = PLAIN
    """What its configuration says about the base."""


class MergedModel:
    """The tensors of a base with sets merged into them; without sets, the base itself.

    `match` is the prefix of the base tensors that ambiguous module paths mean. Raises
    ShapeMismatchError, InvalidRequestError or UnsupportedAdapterError, naming the modules, if a set
    does not fit the base or the base cannot hold the sum.
    """

    def __init__(self, base: Base, ingredients: list[Ingredient], match: str | None = None) -> None:
        if match is not None:
            base.paths.check_match(match)
        self.base = base
        self._ingredients = ingredients
        self._match = match
        self._touched: dict[str, Touched] = {}
        self._tensors: dict[str, MergedTensor] = {}
        needs = [self._add(one) for one in ingredients]
        self.is_untied = any(needs)
        """Whether the head needs a tensor of its own, which the base does not have."""
        if self.is_untied:
            self._check_untied(ingredients)
        for name, touched in self._touched.items():
            check_tensor(base, name, touched, is_one_set=len(ingredients) == 1)

    @property
    def etags(self) -> list[str]:
        """ETags of the merged sets."""
        return [one.etag for one in self._ingredients]

    @property
    def set_names(self) -> list[str]:
        """Names of the merged sets."""
        return [one.lora_set.adapter_name for one in self._ingredients]

    @property
    def digest(self) -> str:
        """Forty hexadecimal digits that identify the content of all files."""
        parts = [self.base.digest, *(f"{one.etag}*{one.weight!r}" for one in self._ingredients)]
        if self._match is not None:
            parts.append(f"match={self._match}")
        return digest_of("\n".join(parts))

    @property
    def changes(self) -> Mapping[str, Touched]:
        """The changes by tensor of the base."""
        return self._touched

    def values(self, name: str) -> MergedTensor | Tensor:
        """Return a tensor, changed or not, as a matrix; a vector is one row."""
        if name in self._touched:
            return self.tensor(name)
        found = self.base.tensor(name)
        return found.as_matrix(found.shape[0] if len(found.shape) == 2 else 1)

    def tensor(self, name: str) -> MergedTensor:
        """Return a changed tensor, always as the same object, so that norms are computed once."""
        known = self._tensors.get(name)
        if known is not None:
            return known
        made = MergedTensor(self.base.tensor(name), self._touched[name])
        return self._tensors.setdefault(name, made)

    def _add(self, one: Ingredient) -> bool:
        """Add the changes of a set; return whether it needs a head that is not tied."""
        check_not_empty(one.lora_set)
        replacements, is_untied = tied_replacements(self.base, one.lora_set, one.options)
        self._add_adapters(one)
        self._add_replacements(one, replacements)
        return is_untied

    def _check_untied(self, ingredients: Sequence[Ingredient]) -> None:
        for one in ingredients:
            replaced, is_untied = tied_replacements(self.base, one.lora_set, one.options)
            if not is_untied and any(is_embedding(name) for name in replaced):
                raise UnsupportedAdapterError(
                    f"set {one.lora_set.adapter_name!r} replaces the embedding that is also the "
                    "head, and another set changes one of the two; merge them one after the other",
                    base=self.base.name,
                )

    def _add_adapters(self, one: Ingredient) -> None:
        lost: list[str] = []
        fits: list[Fit] = []
        names: list[str] = []
        adapters = one.lora_set.registry.adapters
        parameters = one.options.parameters_of(adapters)
        tied = tied_adapters(self.base, one.lora_set)
        for module, adapter in adapters.items():
            if module in tied:
                continue
            found = list(self._weights_of(module, adapter, parameters.get(module)))
            if not found:
                lost.append(module)
            for name, part in found:
                names.append(name)
                fits.append((module, part, self.base.info(name).shape))
        if lost:
            raise _lost(self.base, one.lora_set, lost)
        others = is_any_transposed(fits)
        for name, fit in zip(names, fits, strict=True):
            adapter = as_stored(
                fit,
                self.base.model_type,
                may_be_transposed=one.options.is_transposed,
                others_are=others,
            )
            self._touch(name).deltas.append((adapter, one.weight))
            if adapter.bias is not None:
                bias = f"{name.removesuffix('weight')}bias"
                self._touch(bias).biases.append((adapter, one.weight))

    def _weights_of(
        self, module: str, adapter: LoraAdapter, parameter: str | None
    ) -> Iterator[tuple[str, LoraAdapter]]:
        """Yield the name of each tensor that an adapter changes, and its part of the adapter."""
        if parameter is not None and not parameter.endswith(".weight"):
            yield from expert_weights(self.base, parameter, adapter, self._match)
            return
        for name in self.base.paths.find(f"{module}.weight", self._match):
            yield name, adapter

    def _add_replacements(self, one: Ingredient, replacements: Mapping[str, Array]) -> None:
        for parameter, array in replacements.items():
            module = parameter.removesuffix(TOKEN_ROWS)
            wanted = parameter if module == parameter else f"{module}.weight"
            name = self.base.paths.find_one(wanted, self._match) or wanted
            touched = self._touch(name)
            present = touched.replacement if module == parameter else touched.rows
            if present is not None or one.weight != 1.0:
                raise UnsupportedAdapterError(
                    f"set {one.lora_set.adapter_name!r} replaces {parameter!r}, so it cannot be "
                    "weighted or merged with another set that replaces it; merge it with weight 1",
                    tensor=parameter,
                )
            if module == parameter:
                touched.replacement = array
            else:
                touched.rows = TokenRows(np.array(one.options.rows_of(module), np.intp), array)

    def _touch(self, name: str) -> Touched:
        return self._touched.setdefault(name, Touched())


def _lost(base: Base, lora_set: BonsaiLoraSet, modules: list[str]) -> InvalidRequestError:
    return InvalidRequestError(
        f"base {base.name!r} has no weights for {counted(len(modules), 'module')} of set "
        f"{lora_set.adapter_name!r}: {', '.join(modules[:8])}; merge it into the model that it was "
        "trained on",
        modules=modules[:64],
        base=base.name,
    )
