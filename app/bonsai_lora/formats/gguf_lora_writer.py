"""GGUF LoRA files, written: a set as llama.cpp computes it, exactly, or not at all.

See gguf_lora for the format. A file has one alpha, and the scale of a tensor is alpha / r. If one
alpha gives the scaling of every adapter, it is written and the factors stay as they are. Otherwise
(rsLoRA, patterns of alphas) alpha is 0, which means a scale of 1, and each B is multiplied by its
scaling. The file is planned before it is computed, so any part of it can be computed alone; its
bytes depend on the arguments only.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats, to_float32
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import UnsupportedAdapterError
from bonsai_lora.formats.fused import MAX_EXPERTS
from bonsai_lora.formats.gguf_lora import (
    ALPHA_KEY,
    BASE_NAME_KEY,
    EMBEDDING,
    FOLDED_KEY,
    is_multiplied,
    orders,
)
from bonsai_lora.formats.gguf_lora_file import LoraFile, MakeRows
from bonsai_lora.formats.gguf_names import Change, Counterpart, Heads, to_gguf
from bonsai_lora.formats.gguf_types import BY_NAME, TensorType
from bonsai_lora.formats.gguf_writer import Writable, plan
from bonsai_lora.formats.hadamard import Folding
from bonsai_lora.formats.peft_options import BaseOptions

_SPLIT = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Fused parameters -> the separate tensors of an expert, in the order of their outputs."""
_FUSED = re.compile(r"(?P<core>.+\.experts)\.(?P<leaf>gate_up_proj|down_proj)")
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of the base that a GGUF LoRA is for."""

    architecture: str
    heads: Heads | None = None
    """Needed only where GGUF orders rows by head."""
    is_tied: bool | None = None
    """Whether the head shares the embedding; None if unknown."""
    experts: int | None = None
    """Experts of a layer; if None, one more than the largest number in the set."""


@dataclass(frozen=True, eq=False)
class _Target:
    """A tensor of the base, with its adapter, or those of a stack of experts by number."""

    name: str
    change: Change
    adapters: Mapping[int, LoraAdapter]
    experts: int | None
    """Size of the stack; None for a plain tensor."""

    @cached_property
    def first(self) -> LoraAdapter:
        return next(iter(self.adapters.values()))

    @cached_property
    def rank(self) -> int:
        """Rank of the tensor; experts of a smaller one are padded with zeros."""
        return max(one.rank for one in self.adapters.values())

    @property
    def a_shape(self) -> tuple[int, ...]:
        if self.first.layer == "embedding":
            return (self.first.d_in, self.rank)
        return (*self._stack, self.rank, self.first.d_in)

    @property
    def b_shape(self) -> tuple[int, ...]:
        return (*self._stack, self.first.d_out, self.rank)

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    def check_heads(self, heads: Heads | None) -> None:
        """Raise UnsupportedAdapterError or UnsupportedGgufError unless the heads fit."""
        orders(self.name, self.change, heads, self.first.d_out, self.first.d_in)

    def a_rows(self, rows: slice, heads: Heads | None, folding: Folding | None) -> Floats:
        """Return rows of lora_a, counted over all experts, (n, width)."""
        if self.first.layer == "embedding":
            return to_float32(np.ascontiguousarray(self.first.a_matrix[:, rows].T))
        out = np.zeros((rows.stop - rows.start, self.first.d_in), np.float32)
        own = folding if folding is not None and self.name in folding.weights else None
        for number, inside, place in _spans(rows, self.rank):
            adapter = self.adapters.get(number)
            if adapter is None or inside.start >= adapter.rank:
                continue
            values = to_float32(adapter.a_matrix[inside])
            _, order = orders(self.name, self.change, heads, adapter.d_out, adapter.d_in)
            if order is not None and not (own is not None and own.is_grouped):
                values = values[:, order]
            part = out[place]
            part[: len(values)] = values if own is None else own.fold(values)
        return out

    def b_rows(self, rows: slice, heads: Heads | None, *, is_scaled: bool) -> Floats:
        """Return rows of lora_b, times the scaling of each adapter if it `is_scaled`."""
        out = np.zeros((rows.stop - rows.start, self.rank), np.float32)
        for number, inside, place in _spans(rows, self.first.d_out):
            adapter = self.adapters.get(number)
            if adapter is None:
                continue
            order, _ = orders(self.name, self.change, heads, adapter.d_out, adapter.d_in)
            values = to_float32(adapter.b_matrix[inside if order is None else order[inside]])
            factor = np.float32(adapter.scaling if is_scaled else 1)
            with np.errstate(over="ignore"):  # infinities are refused afterwards
                np.multiply(values, factor, out=out[place, : adapter.rank])
        return out


def _spans(rows: slice, height: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield number, rows inside, and place among `rows`, of the experts that have `rows`."""
    for number in range(rows.start // height, -(-rows.stop // height)):
        start = number * height
        first, last = max(rows.start, start), min(rows.stop, start + height)
        yield (
            number,
            slice(first - start, last - start),
            slice(first - rows.start, last - rows.start),
        )


def encode_lora(
    lora_set: BonsaiLoraSet,
    options: BaseOptions,
    model: Model,
    dtype: str,
    etag: str,
    folding: Folding | None = None,
) -> LoraFile:
    """Return the GGUF LoRA of a set; `dtype` is F32, F16, BF16 or Q8_0.

    Rows that Q8_0 cannot store, being no multiple of 32 values, become F16, as in llama.cpp's
    converter. With `folding`, that of the base, A is folded for the weights that are. Raises
    UnsupportedAdapterError for what a GGUF LoRA cannot express. Nothing is computed yet.
    """
    targets = _targets(lora_set, options, model)
    alpha = _common_alpha(targets)
    values: dict[str, MakeRows] = {}
    layout: dict[str, tuple[TensorType, tuple[int, ...]]] = {}
    for one in targets:
        one.check_heads(model.heads)
        _check_folded(one, folding)
        for half, shape, make in (
            ("lora_a", one.a_shape, partial(one.a_rows, heads=model.heads, folding=folding)),
            (
                "lora_b",
                one.b_shape,
                partial(one.b_rows, heads=model.heads, is_scaled=alpha == 0),
            ),
        ):
            kind, name = _kind(dtype, shape[-1]), f"{one.name}.{half}"
            layout[name], values[name] = (kind, shape), make
    made = plan(_pairs(lora_set, model, alpha, is_folded=folding is not None), layout)
    may_overflow = dtype != "F32" or alpha == 0 or folding is not None
    return LoraFile(made, values, etag, may_overflow=may_overflow)


def _check_folded(target: _Target, folding: Folding | None) -> None:
    """Raise UnsupportedAdapterError for a folded embedding: its rows, not inputs, are folded."""
    if folding is not None and target.name == EMBEDDING and EMBEDDING in folding.weights:
        raise UnsupportedAdapterError(
            f"the set adapts {EMBEDDING!r}, whose rows are Hadamard-folded; an adapter beside them "
            "cannot be folded. Download the merged model instead",
            module=EMBEDDING,
        )


def _pairs(
    lora_set: BonsaiLoraSet, model: Model, alpha: float, *, is_folded: bool
) -> dict[str, Writable]:
    return {
        "general.architecture": model.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": lora_set.adapter_name,
        **_base_pairs(lora_set.base_model_name),
        ALPHA_KEY: np.float32(alpha),
        **({FOLDED_KEY: True} if is_folded else {}),
        "general.quantization_version": np.uint32(2),
    }


def _base_pairs(name: str) -> dict[str, Writable]:
    return {"general.base_model.count": np.uint32(1), BASE_NAME_KEY: name} if name else {}


def _kind(dtype: str, width: int) -> TensorType:
    kind = BY_NAME[dtype]
    return BY_NAME["F16"] if width % kind.block else kind


def _common_alpha(targets: Sequence[_Target]) -> float:
    """Return the alpha that yields the scaling of every adapter; 0 if there is none."""
    alpha = np.float32(targets[0].first.config.alpha)
    for one in targets:
        scale = alpha / np.float32(one.rank)
        if any(np.float32(adapter.scaling) != scale for adapter in one.adapters.values()):
            return 0.0
    return float(alpha)


def _targets(lora_set: BonsaiLoraSet, options: BaseOptions, model: Model) -> list[_Target]:
    """Return the tensors that a set changes, by layer and name."""
    _check_expressible(lora_set, options)
    found: dict[str, dict[int, LoraAdapter]] = {}
    counterparts: dict[str, Counterpart] = {}
    for name, adapter in _weights(lora_set, options):
        counterpart = to_gguf(model.architecture, name)
        if counterpart is None or not is_multiplied(counterpart.name):
            raise UnsupportedAdapterError(
                f"{name!r} is not a matrix with a name in GGUF for architecture "
                f"{model.architecture!r}; expected one such as "
                "model.layers.0.self_attn.q_proj.weight",
                module=name,
                architecture=model.architecture,
            )
        _check_embedding(counterpart.name, adapter, model)
        if adapter.rank:  # without a rank, it changes nothing
            counterparts[counterpart.name] = counterpart
            found.setdefault(counterpart.name, {})[counterpart.expert or 0] = adapter
    if not found:
        raise UnsupportedAdapterError(
            "the set has no adapters, and llama.cpp refuses a file without tensors; add some",
            set=lora_set.adapter_name,
        )
    targets = [_target(counterparts[name], adapters, model) for name, adapters in found.items()]
    return sorted(targets, key=lambda one: [*_natural(one.name)])


def _natural(name: str) -> Iterator[tuple[int, str]]:
    for part in _NUMBER.split(name):
        yield (int(part), "") if part.isdecimal() else (0, part)


def _target(counterpart: Counterpart, adapters: Mapping[int, LoraAdapter], model: Model) -> _Target:
    experts = None
    if counterpart.expert is not None:
        experts = min(model.experts or max(adapters) + 1, MAX_EXPERTS)
        shapes = sorted({(one.d_in, one.d_out) for one in adapters.values()})
        if len(shapes) > 1 or max(adapters) >= experts:
            raise UnsupportedAdapterError(
                f"the experts of {counterpart.name!r} have the shapes {shapes} and numbers up to "
                f"{max(adapters)}; expected one shape, and numbers below {experts}",
                module=counterpart.name,
            )
    return _Target(counterpart.name, counterpart.change, adapters, experts)


def _weights(lora_set: BonsaiLoraSet, options: BaseOptions) -> Iterator[tuple[str, LoraAdapter]]:
    """Yield the tensor of a checkpoint that each adapter changes; fused experts one by one."""
    adapters = lora_set.registry.adapters
    parameters = options.parameters_of(adapters)
    for module, adapter in adapters.items():
        parameter = parameters.get(module, f"{module}.weight")
        match = _FUSED.fullmatch(parameter)
        if match is None:
            yield parameter, adapter
            continue
        names = _SPLIT.get(match["leaf"], (match["leaf"],))
        rows = adapter.d_out // len(names)
        for number, expert in enumerate(adapter.each_expert):
            for place, name in enumerate(names):
                part = expert.b_matrix[place * rows : (place + 1) * rows]
                yield f"{match['core']}.{number}.{name}.weight", replace(expert, b_matrix=part)


def _check_expressible(lora_set: BonsaiLoraSet, options: BaseOptions) -> None:
    """Raise UnsupportedAdapterError for what no GGUF LoRA can express."""
    adapters = lora_set.registry.adapters
    reasons = {
        "DoRA": [name for name, one in adapters.items() if one.magnitude is not None],
        "a bias of lora_B": [name for name, one in adapters.items() if one.bias is not None],
        "replaced parameters": list(lora_set.replacements),
        "fan_in_fan_out": list(adapters) if options.is_transposed else [],
    }
    for what, names in reasons.items():
        if names:
            raise UnsupportedAdapterError(
                f"a GGUF LoRA cannot express {what}, as in {names[0]!r}, one of {len(names)}; "
                "download the merged model instead",
                modules=names[:64],
            )


def _check_embedding(name: str, adapter: LoraAdapter, model: Model) -> None:
    """Raise UnsupportedAdapterError for an embedding or head that llama.cpp would get wrong."""
    if (name == EMBEDDING) != (adapter.layer == "embedding"):
        raise UnsupportedAdapterError(
            f"the adapter of {name!r} is for a layer of kind {adapter.layer}, which it is not; "
            "train it with peft",
            module=name,
        )
    is_unsure = name == EMBEDDING and model.is_tied is None
    if name in (EMBEDDING, "output.weight") and (model.is_tied or is_unsure):
        why = (
            "the base ties its embedding to its head"
            if model.is_tied
            else "the base, which is not served here, may tie its embedding to its head"
        )
        raise UnsupportedAdapterError(
            f"the set adapts {name!r}, but {why}; llama.cpp aborts on such an adapter. Download "
            "the merged model instead",
            module=name,
        )
