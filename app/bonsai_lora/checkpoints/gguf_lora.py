"""GGUF LoRA files, computed while they are read: a set as llama.cpp applies it, or not at all.

See formats/gguf_lora.py for the format. A file has one alpha, and the scale of a tensor is
alpha / r. If one alpha gives the scaling of every adapter, it is written and the factors stay as
they are. Otherwise (rsLoRA, patterns of alphas) alpha is 0, which means a scale of 1, and each B is
multiplied by its scaling. The file is planned before it is computed, so any part of it can be
computed alone; its bytes depend on the arguments only.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from bonsai_lora.checkpoints.experts import split_outputs
from bonsai_lora.checkpoints.gguf_tensor import Conversion, Stacked
from bonsai_lora.checkpoints.parts import MergedFile, Part, Values, computed_as, gguf_parts
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats, to_float32
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.merge import BLOCK_VALUES, Block, blocks
from bonsai_lora.errors import UnsupportedAdapterError
from bonsai_lora.formats.fused import MAX_EXPERTS
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_lora import (
    ALPHA_KEY,
    BASE_NAME_KEY,
    FOLDED_KEY,
    is_multiplied,
    orders,
)
from bonsai_lora.formats.gguf_names import (
    GGUF_EMBEDDING,
    GGUF_HEAD,
    Change,
    Counterpart,
    Heads,
    to_gguf,
)
from bonsai_lora.formats.gguf_types import BY_NAME, TensorType
from bonsai_lora.formats.gguf_writer import Plan, Writable, plan
from bonsai_lora.formats.hadamard import Folding
from bonsai_lora.formats.peft_options import BaseOptions

_LARGEST = {"F32": 0xFFFFFF << 104, "BF16": 0xFF << 120, "F16": 65504, "Q8_0": 127 * 65504}
"""Largest finite value of each type."""
_COPIES = 6
"""Float32 copies of a piece: widened, ordered, folded, placed and encoded; and one being sent."""
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

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of a factor, whose matrices have this height and width."""
        return (height, width) if self.experts is None else (self.experts, height, width)

    def values(self, shape: tuple[int, ...], make: "_MakeRows") -> Values:
        """Return a factor of this shape: the matrix of each expert, one below the other."""
        height, width = shape[-2:]
        each = [
            _Padded((height, width), self.adapters.get(number), make)
            for number in range(self.experts or 1)
        ]
        return Stacked(each)


_MakeRows = Callable[[LoraAdapter, slice], Floats]
"""Returns those of some rows of an adapter's factor that exist."""


@dataclass(frozen=True, eq=False, slots=True)
class _Padded:
    """A factor of one adapter; rows and columns that it lacks are zeros."""

    shape: tuple[int, int]
    adapter: LoraAdapter | None
    make: _MakeRows

    def __getitem__(self, block: Block) -> Floats:
        rows, columns = block
        out = np.zeros((rows.stop - rows.start, self.shape[1]), np.float32)
        if self.adapter is not None:
            found = self.make(self.adapter, rows)
            out[: len(found), : found.shape[1]] = found
        return out[:, columns]


def _embedding_rows(adapter: LoraAdapter, rows: slice) -> Floats:
    return to_float32(np.ascontiguousarray(adapter.a_matrix[:, rows].T))


def _a_rows(
    adapter: LoraAdapter, rows: slice, *, conversion: Conversion, folding: Folding | None
) -> Floats:
    """Return rows of A with the columns in the file's order, folded as its weights are."""
    values = to_float32(adapter.a_matrix[rows])
    order = conversion.columns(adapter.d_in)
    values = values if order is None else values[:, order]
    return values if folding is None else folding.fold(values)


def _b_rows(
    adapter: LoraAdapter, rows: slice, *, conversion: Conversion, is_scaled: bool
) -> Floats:
    """Return rows of B in the file's order, times the scaling of the adapter if it `is_scaled`."""
    order = conversion.rows(adapter.d_out)
    values = to_float32(adapter.b_matrix[rows if order is None else order[rows]])
    with np.errstate(over="ignore"):  # infinities are refused afterwards
        return values * np.float32(adapter.scaling) if is_scaled else values


class LoraFile(MergedFile):
    """A GGUF LoRA file, of which any bytes can be computed."""

    def __init__(
        self, planned: Plan, values: Mapping[str, Values], etag: str, *, may_overflow: bool
    ) -> None:
        def part_of(name: str, info: TensorInfo) -> Part:
            return computed_as(info.type.name, values[name])

        parts = gguf_parts(planned, lambda: planned.head, part_of)
        super().__init__(parts, etag, "application/octet-stream")
        largest = max(
            max(width, min(height * width, BLOCK_VALUES))
            for height, width in (one.shape for one in values.values())
        )
        self.working_bytes = _COPIES * 4 * largest
        """Memory for one piece, while it is computed and the one before it is sent."""
        self._may_overflow = may_overflow
        self._planned = planned
        self._values = values

    def check_values(self) -> None:
        """Raise UnsupportedAdapterError for values beyond their type; computes all of them."""
        if not self._may_overflow:
            return
        for name, values in self._values.items():
            for block in blocks(*values.shape):
                _check_size(name, self._planned.tensors[name].type, values[block])


def _check_size(name: str, kind: TensorType, values: Floats) -> None:
    """Raise UnsupportedAdapterError if a value is beyond the largest of its type."""
    largest = float(max(values.max(initial=0), -values.min(initial=0)))
    if largest > _LARGEST[kind.name]:
        raise UnsupportedAdapterError(
            f"{name} has values up to {largest:.6g}, beyond the largest {kind.name} value; use "
            "dtype=F32, or train with a smaller scaling",
            key=name,
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
    values: dict[str, Values] = {}
    layout: dict[str, tuple[TensorType, tuple[int, ...]]] = {}
    for one in targets:
        _check_folded(one, folding)
        for half, shape, make in _factors(one, model.heads, folding, is_scaled=alpha == 0):
            name = f"{one.name}.{half}"
            layout[name] = _kind(dtype, shape[-1]), shape
            values[name] = one.values(shape, make)
    planned = plan(_pairs(lora_set, model, alpha, is_folded=folding is not None), layout)
    may_overflow = dtype != "F32" or alpha == 0 or folding is not None
    return LoraFile(planned, values, etag, may_overflow=may_overflow)


def _factors(
    target: _Target, heads: Heads | None, folding: Folding | None, *, is_scaled: bool
) -> Iterator[tuple[str, tuple[int, ...], _MakeRows]]:
    """Yield the name, the shape and the rows of both factors.

    Raises UnsupportedAdapterError or UnsupportedGgufError unless the heads fit.
    """
    first, own = target.first, None
    orders(target.name, target.change, heads, first.d_out, first.d_in)
    if folding is not None and target.name in folding.weights:
        own = folding
    is_grouped = own is not None and own.is_grouped
    conversion = Conversion(target.change, heads or Heads(), has_columns=not is_grouped)
    if first.layer == "embedding":
        yield "lora_a", target.shape(first.d_in, target.rank), _embedding_rows
    else:
        make = partial(_a_rows, conversion=conversion, folding=own)
        yield "lora_a", target.shape(target.rank, first.d_in), make
    make = partial(_b_rows, conversion=conversion, is_scaled=is_scaled)
    yield "lora_b", target.shape(first.d_out, target.rank), make


def _check_folded(target: _Target, folding: Folding | None) -> None:
    """Raise UnsupportedAdapterError for a folded embedding: its rows, not inputs, are folded."""
    if folding is not None and target.name == GGUF_EMBEDDING and GGUF_EMBEDDING in folding.weights:
        raise UnsupportedAdapterError(
            f"the set adapts {GGUF_EMBEDDING!r}, whose rows are Hadamard-folded; an adapter beside "
            "them cannot be folded. Download the merged model instead",
            module=GGUF_EMBEDDING,
        )


def _pairs(
    lora_set: BonsaiLoraSet, model: Model, alpha: float, *, is_folded: bool
) -> dict[str, Writable]:
    base = lora_set.base_model_name
    return {
        "general.architecture": model.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": lora_set.adapter_name,
        **({"general.base_model.count": np.uint32(1), BASE_NAME_KEY: base} if base else {}),
        ALPHA_KEY: np.float32(alpha),
        **({FOLDED_KEY: True} if is_folded else {}),
        "general.quantization_version": np.uint32(2),
    }


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
        for number, expert in enumerate(adapter.each_expert):
            for name, part in split_outputs(match["leaf"], expert):
                yield f"{match['core']}.{number}.{name}.weight", part


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
    if (name == GGUF_EMBEDDING) != (adapter.layer == "embedding"):
        raise UnsupportedAdapterError(
            f"the adapter of {name!r} is for a layer of kind {adapter.layer}, which it is not; "
            "train it with peft",
            module=name,
        )
    is_unsure = name == GGUF_EMBEDDING and model.is_tied is None
    if name in (GGUF_EMBEDDING, GGUF_HEAD) and (model.is_tied or is_unsure):
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
