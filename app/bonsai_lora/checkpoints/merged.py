"""Merged checkpoints, computed while they are read and never stored.

A merged file has the header, sizes and offsets of its base file; only the bytes of changed tensors
differ. Each requested byte range is computed from fixed blocks of each tensor, so that a range is
always the same slice of the whole file.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bonsai_lora.checkpoints.bases import Base
from bonsai_lora.checkpoints.experts import expert_weights
from bonsai_lora.checkpoints.fit import check_not_empty, check_tensor
from bonsai_lora.checkpoints.orientation import Fit, as_stored, is_any_transposed
from bonsai_lora.checkpoints.tensors import MergedTensor, TokenRows, Touched
from bonsai_lora.checkpoints.ties import tied_replacements
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.merge import Block
from bonsai_lora.errors import InvalidRequestError, UnsupportedAdapterError, counted
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.peft_keys import TOKEN_ROWS
from bonsai_lora.formats.peft_options import PLAIN, BaseOptions

PIECE_BYTES = 1 << 20
"""Length of the pieces in which unchanged bytes are sent."""

_BYTES = "application/octet-stream"

Piece = Callable[[], memoryview]
"""Reads or computes a part of a file; callable in any thread. Raises BaseChangedError."""


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One set of a merged model, and the weight of its deltas."""

    lora_set: BonsaiLoraSet
    etag: str
    weight: float = 1.0
    options: BaseOptions = PLAIN
    """What its configuration says about the base."""


class MergedModel:
    """All files of a base with sets merged into them.

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
        for one in ingredients:
            check_not_empty(one.lora_set)
            self._add_adapters(one)
            self._add_replacements(one)
        for name, touched in self._touched.items():
            check_tensor(base, name, touched, is_one_set=len(ingredients) == 1)

    @property
    def etags(self) -> list[str]:
        """ETags of the merged sets."""
        return [one.etag for one in self._ingredients]

    @property
    def digest(self) -> str:
        """Forty hexadecimal digits that identify the content of all files."""
        parts = [self.base.digest, *(f"{one.etag}*{one.weight!r}" for one in self._ingredients)]
        if self._match is not None:
            parts.append(f"match={self._match}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]

    def files(self) -> list[str]:
        """Return the names of all files, which are those of the base."""
        return sorted(self.base.files)

    def file(self, name: str) -> "MergedFile | None":
        """Return a file of the model; None if the base has no file with this name."""
        if name not in self.base.files:
            return None
        return MergedFile(self, name)

    def is_touched(self, tensor: str) -> bool:
        """Return whether a tensor differs from that of the base."""
        return tensor in self._touched

    @property
    def changes(self) -> Mapping[str, Touched]:
        """The changes by tensor of the base."""
        return self._touched

    def tensor(self, name: str) -> MergedTensor:
        """Return a changed tensor, always as the same object, so that norms are computed once."""
        known = self._tensors.get(name)
        if known is not None:
            return known
        base = self.base.tensor(name)
        assert base is not None
        return self._tensors.setdefault(name, MergedTensor(base, self._touched[name]))

    def _add_adapters(self, one: Ingredient) -> None:
        lost: list[str] = []
        fits: list[Fit] = []
        names: list[str] = []
        adapters = one.lora_set.registry.adapters
        parameters = one.options.parameters_of(adapters)
        for module, adapter in adapters.items():
            found = list(self._weights_of(module, adapter, parameters.get(module)))
            if not found:
                lost.append(module)
            for name, part in found:
                info = self.base.info(name)
                assert info is not None
                names.append(name)
                fits.append((module, part, info.shape))
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

    def _add_replacements(self, one: Ingredient) -> None:
        for parameter, array in tied_replacements(self.base, one.lora_set, one.options).items():
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


class MergedFile:
    """One file of a merged model: its size, its ETag, and any range of its bytes."""

    def __init__(self, model: MergedModel, name: str) -> None:
        self._model = model
        self._file = model.base.files[name]
        self._header = model.base.headers.get(name)
        self.size_bytes = self._file.size_bytes
        seed = f"{model.digest}/{name}" if self._header else f"{model.base.digest}/{name}"
        self.etag = f'"{hashlib.sha256(seed.encode()).hexdigest()[:40]}"'
        self.media_type = "application/json" if name.endswith(".json") else _BYTES

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of the bytes [start, stop), in order."""
        for name, first, last in self._spans(start, stop):
            if name is None:
                for offset in range(first, last, PIECE_BYTES):
                    yield partial(self._file.read, offset, min(offset + PIECE_BYTES, last))
            else:
                yield from self._computed(name, first, last)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[str | None, int, int]]:
        """Yield (changed tensor or None, start, stop) of the spans within [start, stop)."""
        position = start
        for name, first, last in self._touched_spans():
            if last <= position:
                continue
            if first >= stop:
                break
            if first > position:
                yield None, position, first
                position = first
            yield name, position, min(last, stop)
            position = min(last, stop)
        if position < stop:
            yield None, position, stop

    def _touched_spans(self) -> Iterator[tuple[str, int, int]]:
        if self._header is None:
            return
        for name, info in self._header.tensors.items():
            if self._model.is_touched(name) and info.stop > info.start:
                yield (
                    name,
                    self._header.data_start + info.start,
                    self._header.data_start + info.stop,
                )

    def _computed(self, name: str, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of a changed tensor, cut from its fixed blocks."""
        assert self._header is not None
        tensor = self._model.tensor(name)
        offset = self._header.data_start + self._header.tensors[name].start
        for block, size in tensor.blocks():
            first, last = max(start, offset), min(stop, offset + size)
            if first < last:
                yield partial(_merged_bytes, tensor, block, first - offset, last - offset)
            offset += size
            if offset >= stop:
                return


def _merged_bytes(tensor: MergedTensor, block: Block, first: int, last: int) -> memoryview:
    """Return the bytes [first, last) of a merged block."""
    return safetensors.as_bytes(tensor.compute(block))[first:last]


def _lost(base: Base, lora_set: BonsaiLoraSet, modules: list[str]) -> InvalidRequestError:
    return InvalidRequestError(
        f"base {base.name!r} has no weights for {counted(len(modules), 'module')} of set "
        f"{lora_set.adapter_name!r}: {', '.join(modules[:8])}; merge it into the model that it was "
        "trained on",
        modules=modules[:64],
        base=base.name,
    )


def merge_info(model: MergedModel) -> list[Mapping[str, Any]]:
    """Return the name, size and ETag of each file of a merged model."""
    found: list[Mapping[str, Any]] = []
    for name in model.files():
        file = model.file(name)
        assert file is not None
        found.append({"name": name, "size_bytes": file.size_bytes, "etag": file.etag})
    return found
