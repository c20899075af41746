"""Merged checkpoints that exist only while they are read.

A merged file has its base file's header, sizes and offsets; only the bytes of adapted tensors
differ. Any byte range is computed when it is asked for, from fixed blocks of each tensor, so that
a range is always the same slice of the whole.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bonsai_lora.checkpoints.bases import Base, identity_of, row_norms
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import FLOAT32, Array, round_to, to_float32
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.merge import Block, blocks, merge_rows
from bonsai_lora.errors import (
    BaseChangedError,
    InvalidRequestError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.dtypes import FLOAT_DTYPES

PIECE_BYTES = 1 << 20
"""Length of the pieces in which untouched bytes are handed out."""

_BYTES = "application/octet-stream"

Piece = Callable[[], bytes | memoryview]
"""A part of a file that is computed when it is called, in any thread."""


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One set of a merged model, with the weight of all its deltas."""

    lora_set: BonsaiLoraSet
    etag: str
    weight: float = 1.0


@dataclass(eq=False, slots=True)
class _Touched:
    """What happens to one tensor of the base."""

    deltas: list[tuple[LoraAdapter, float]] = field(default_factory=list)
    biases: list[tuple[LoraAdapter, float]] = field(default_factory=list)
    replacement: Array | None = None


class MergedModel:
    """All files of a base with sets merged into them.

    Raises ShapeMismatchError, InvalidRequestError or UnsupportedAdapterError, naming the modules,
    where a set does not fit the base or the sum cannot be stored in it.
    """

    def __init__(self, base: Base, ingredients: list[Ingredient]) -> None:
        self.base = base
        self._ingredients = ingredients
        self._touched: dict[str, _Touched] = {}
        self._tensors: dict[str, _Tensor] = {}
        for one in ingredients:
            _check_not_empty(one.lora_set)
            _check_ties(base, one.lora_set)
            self._add_adapters(one)
            self._add_replacements(one)
        for name, touched in self._touched.items():
            _check_tensor(base, name, touched)

    @property
    def etags(self) -> list[str]:
        """The tags of the sets that are merged in."""
        return [one.etag for one in self._ingredients]

    @property
    def digest(self) -> str:
        """Forty hexadecimal digits that stand for the content of all files."""
        parts = [self.base.digest, *(f"{one.etag}*{one.weight!r}" for one in self._ingredients)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]

    def files(self) -> list[str]:
        """Return the names of all files, those of the base."""
        return sorted(self.base.files)

    def file(self, name: str) -> "MergedFile | None":
        """Return a file of the model, None where the base has none of that name."""
        if name not in self.base.files:
            return None
        return MergedFile(self, name)

    def is_touched(self, tensor: str) -> bool:
        """Return whether a tensor differs from the base's."""
        return tensor in self._touched

    def tensor(self, name: str, base: Array) -> "_Tensor":
        """Return a touched tensor; the same object each time, so that norms are computed once."""
        return self._tensors.setdefault(name, _Tensor(base, self._touched[name]))

    def _add_adapters(self, one: Ingredient) -> None:
        lost = []
        for module, adapter in one.lora_set.registry.adapters.items():
            names = self.base.weights_of(module)
            if not names:
                lost.append(module)
            for name in names:
                self._touch(name).deltas.append((adapter, one.weight))
                if adapter.bias is not None:
                    self._touch(f"{name.removesuffix('weight')}bias").biases.append(
                        (adapter, one.weight)
                    )
        if lost:
            raise InvalidRequestError(
                f"base {self.base.name!r} has no weights for {len(lost)} modules of set "
                f"{one.lora_set.adapter_name!r}: {', '.join(lost[:8])}",
                modules=lost[:64],
                base=self.base.name,
            )

    def _add_replacements(self, one: Ingredient) -> None:
        for name, array in one.lora_set.replacements.items():
            touched = self._touch(name)
            if touched.replacement is not None or one.weight != 1.0:
                raise UnsupportedAdapterError(
                    f"set {one.lora_set.adapter_name!r} replaces {name!r} as a whole, so it cannot "
                    "be weighted or merged with another set that does",
                    tensor=name,
                )
            touched.replacement = array

    def _touch(self, name: str) -> _Touched:
        return self._touched.setdefault(name, _Touched())


class MergedFile:
    """One file of a merged model: its size, its tag, and any range of its bytes."""

    def __init__(self, model: MergedModel, name: str) -> None:
        self._model = model
        self._raw = model.base.files[name]
        self._header = model.base.headers.get(name)
        self._path = model.base.folder / name
        self._identity = model.base.identities[name]
        self.name = name
        self.size_bytes = len(self._raw)
        seed = f"{model.digest}/{name}" if self._header else f"{model.base.digest}/{name}"
        self.etag = f'"{hashlib.sha256(seed.encode()).hexdigest()[:40]}"'
        self.media_type = "application/json" if name.endswith(".json") else _BYTES

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the parts that make up the bytes [start, stop), in order."""
        for name, first, last in self._spans(start, stop):
            if name is None:
                for offset in range(first, last, PIECE_BYTES):
                    yield self._copy(offset, min(offset + PIECE_BYTES, last))
            else:
                yield from self._computed(name, first, last)

    def _copy(self, start: int, stop: int) -> Piece:
        def piece() -> bytes:
            content = bytes(self._raw[start:stop])
            self._check_unchanged()
            return content

        return piece

    def _spans(self, start: int, stop: int) -> Iterator[tuple[str | None, int, int]]:
        """Yield (touched tensor or None, first byte, last byte) over [start, stop)."""
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
        """Yield the parts of a touched tensor, cut from its fixed blocks."""
        assert self._header is not None
        tensor = self._model.tensor(name, safetensors.view(self._raw, self._header, name))
        offset = self._header.data_start + self._header.tensors[name].start
        for block, size in tensor.blocks():
            first, last = max(start, offset), min(stop, offset + size)
            if first < last:
                yield self._piece(tensor, block, first - offset, last - offset)
            offset += size
            if offset >= stop:
                return

    def _piece(self, tensor: "_Tensor", block: Block, first: int, last: int) -> Piece:
        def piece() -> memoryview:
            content = safetensors.as_bytes(tensor.compute(block))[first:last]
            self._check_unchanged()
            return content

        return piece

    def _check_unchanged(self) -> None:
        """Raise BaseChangedError where what was just read may not be what was opened."""
        try:
            identity = identity_of(self._path.stat())
        except FileNotFoundError:
            return  # the mapping stays as it was
        if identity[0] == self._identity[0] and identity != self._identity:
            raise BaseChangedError(
                f"{self.name} of base {self._model.base.name!r} was overwritten while it was read; "
                "request the file again"
            )


class _Tensor:
    """One touched tensor: base values, and what is done to them block by block."""

    def __init__(self, base: Array, touched: _Touched) -> None:
        self._base = base if base.ndim == 2 else base.reshape(1, -1)
        self._touched = touched
        self._dtype = np.float64 if base.dtype == np.float64 else np.float32
        self._ratio: Array | None = None
        self._lock = threading.Lock()

    def blocks(self) -> Iterator[tuple[Block, int]]:
        rows, columns = self._base.shape
        for block in blocks(rows, columns):
            size = (block[0].stop - block[0].start) * (block[1].stop - block[1].start)
            yield block, size * self._base.dtype.itemsize

    def compute(self, block: Block) -> Array:
        """Return the merged values of a block in the base's dtype, rounded once."""
        out = np.empty(self._base[block].shape, self._base.dtype)
        deltas = self._touched.deltas
        only = deltas[0][0] if len(deltas) == 1 and not self._touched.biases else None
        if (
            only is not None
            and self._touched.replacement is None
            and only.magnitude is None
            and self._dtype is np.float32
        ):
            factors = only.stored_factors_of(*block)
            merge_rows(self._base[block], *factors, _scaled(only, deltas[0][1]), out=out)
            return out
        total = self._start(block)
        with np.errstate(over="ignore", invalid="ignore"):
            for adapter, weight in deltas:
                self._add(total, adapter, weight, block)
            for adapter, weight in self._touched.biases:
                assert adapter.bias is not None
                bias: Array = np.asarray(adapter.bias, self._dtype)
                total += bias[block[1]] * _scaled(adapter, weight)
        if self._dtype is np.float64:
            return total
        round_to(total, out)
        return out

    def _start(self, block: Block) -> Array:
        replacement = self._touched.replacement
        source = self._base if replacement is None else replacement.reshape(self._base.shape)
        if self._dtype is np.float64:
            return np.array(source[block], np.float64, order="C")
        return to_float32(
            np.ascontiguousarray(source[block]), out=np.empty(source[block].shape, FLOAT32)
        )

    def _add(self, total: Array, adapter: LoraAdapter, weight: float, block: Block) -> None:
        rows, columns = block
        right, left = adapter.stored_factors_of(rows, columns)
        scaling = _scaled(adapter, weight)
        merge_rows(total, right, left, scaling, out=total)
        if adapter.magnitude is not None:
            ratio = self._dora_ratio(adapter).astype(self._dtype)
            total *= ratio[rows, None] if adapter.layer == "linear" else ratio[None, columns]

    def _dora_ratio(self, adapter: LoraAdapter) -> Array:
        """Return m / norm (d_out,), from whole rows, computed once per tensor."""
        with self._lock:
            if self._ratio is None:
                assert adapter.magnitude is not None
                self._ratio = to_float32(adapter.magnitude) / row_norms(self._base, adapter)
            return self._ratio


def _scaled(adapter: LoraAdapter, weight: float) -> float:
    return adapter.scaling if weight == 1.0 else adapter.scaling * weight


def _check_tensor(base: Base, name: str, touched: _Touched) -> None:
    info = base.info(name)
    if info is None:
        raise UnsupportedAdapterError(
            f"base {base.name!r} has no tensor {name!r} that could be replaced or added to",
            tensor=name,
            base=base.name,
        )
    if info.dtype not in FLOAT_DTYPES:
        raise UnsupportedAdapterError(
            f"tensor {name!r} of base {base.name!r} is {info.dtype}, into which nothing can be "
            f"merged; expected one of {', '.join(FLOAT_DTYPES)}",
            tensor=name,
            got=info.dtype,
        )
    shapes: list[tuple[int, ...]] = [
        (one.d_out, one.d_in) if one.layer == "linear" else (one.d_in, one.d_out)
        for one, _ in touched.deltas
    ]
    shapes += [(one.d_out,) for one, _ in touched.biases]
    if touched.replacement is not None:
        shapes.append(touched.replacement.shape)
    for shape in shapes:
        if shape != info.shape:
            raise ShapeMismatchError(
                f"tensor {name!r} of base {base.name!r} has shape {list(info.shape)}, but the set "
                f"is for {list(shape)}",
                tensor=name,
                got=list(shape),
                expected=list(info.shape),
            )
    dora = [one for one, _ in touched.deltas if one.magnitude is not None]
    alone = len(touched.deltas) == 1 and touched.replacement is None
    if dora and (not alone or touched.deltas[0][1] != 1.0):
        raise UnsupportedAdapterError(
            f"DoRA scales whole rows of {name!r}, so it cannot be weighted or added to other sets",
            tensor=name,
        )


def _check_not_empty(lora_set: BonsaiLoraSet) -> None:
    if lora_set.registry.is_empty() and not lora_set.replacements:
        raise InvalidRequestError(
            f"set {lora_set.adapter_name!r} is empty: it would change nothing",
            set=lora_set.adapter_name,
        )


def _check_ties(base: Base, lora_set: BonsaiLoraSet) -> None:
    """Raise where the base's head is its embedding, and the set changes only one of them."""
    if "lm_head.weight" in base.weight_map or not base.is_tied:
        return
    changed = {
        name
        for name in (*lora_set.registry.adapters, *lora_set.replacements)
        if {"embed_tokens", "lm_head"} & set(name.split("."))
    }
    if changed:
        raise UnsupportedAdapterError(
            f"base {base.name!r} ties its head to its embedding, and the set changes "
            f"{', '.join(sorted(changed))}: one tensor cannot hold both",
            modules=sorted(changed),
            base=base.name,
        )


def merge_info(model: MergedModel) -> list[Mapping[str, Any]]:
    """Return name, size and tag of each file of a merged model."""
    found: list[Mapping[str, Any]] = []
    for name in model.files():
        file = model.file(name)
        assert file is not None
        found.append({"name": name, "size_bytes": file.size_bytes, "etag": file.etag})
    return found
