"""Decode fused experts, in any layout, as adapters in peft's current layout."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError, counted
from bonsai_lora.formats.experts import (
    FIRST_RIGHT_VERSION,
    LAYOUT_FIELD,
    ExpertLayout,
    is_kept_swapped,
    is_swapped,
    layout_of,
    may_be_grouped,
    rank_major,
    swapped,
)
from bonsai_lora.formats.peft_config import PeftConfig, Scaling
from bonsai_lora.formats.peft_keys import Parts

MAX_EXPERTS = 4096
"""Limit on the experts of one layer."""


@dataclass(frozen=True, slots=True)
class OneLayout:
    """Fused experts in peft's current layout."""

    adapters: Mapping[str, LoraAdapter]
    """Adapters whose layout was changed, by module."""
    config: Mapping[str, Any]
    """The configuration, updated to match."""
    warnings: list[str]


def decode_experts(
    config: PeftConfig, says: Scaling, module: str, parts: Parts, tensors: Mapping[str, Array]
) -> LoraAdapter:
    """Return the adapter of a module in target_parameters, in the layout of the upload.

    A 2-D parameter has one expert, and acts as the weight of a linear layer. Raises
    InvalidAdapterError if rank and shapes contradict each other, UnsupportedAdapterError for
    options that peft does not support for parameters.
    """
    if parts.keys() != {"A", "B"} or config.raw.get("use_dora") or config.raw.get("lora_bias"):
        raise UnsupportedAdapterError(
            f"module {module!r} is in target_parameters, for which peft supports neither DoRA nor "
            "lora_bias; train it without them",
            module=module,
            field="target_parameters",
        )
    a_matrix, b_matrix = tensors[parts["A"]], tensors[parts["B"]]
    rows = rank_of(module, a_matrix, b_matrix)
    rank = says.rank.value
    if says.rank.uncertain or rows % rank:
        raise InvalidAdapterError(
            f"module {module!r} has {counted(rows, 'row')} in A, which is not a multiple of the "
            f"configured rank {rank}; correct r or rank_pattern",
            module=module,
            got=rows,
            expected=rank,
        )
    if rows // rank > MAX_EXPERTS:
        raise InvalidAdapterError(
            f"module {module!r} has {counted(rows, 'row')} in A, which is "
            f"{counted(rows // rank, 'expert')} of rank {rank}; expected at most {MAX_EXPERTS}",
            module=module,
            got=rows // rank,
            expected=MAX_EXPERTS,
        )
    alpha, scaling = says.of(module, rank)
    own = LoraConfig(rank, alpha, config.lora.dropout, config.lora.target_modules)
    experts = rows // rank if rows > rank else None
    return LoraAdapter(own, a_matrix, b_matrix, scaling, experts=experts)


def rank_of(module: str, a_matrix: Array, b_matrix: Array) -> int:
    """Return r of A (r, d_in) and B (d_out, r).

    Raises InvalidAdapterError if they differ, UnsupportedAdapterError for those of a convolution.
    """
    got = [list(a_matrix.shape), list(b_matrix.shape)]
    if a_matrix.ndim == b_matrix.ndim > 2:
        raise UnsupportedAdapterError(
            f"module {module!r} is a convolution, with A {got[0]} and B {got[1]}, but only linear "
            "layers and embeddings are supported; train the adapter without it",
            module=module,
            got=got,
        )
    if a_matrix.ndim != 2 or b_matrix.ndim != 2:
        raise InvalidAdapterError(
            f"module {module!r}: A and B have shapes {got[0]} and {got[1]}; expected (r, d_in) and "
            "(d_out, r)",
            module=module,
            got=got,
        )
    if a_matrix.shape[0] != b_matrix.shape[1]:
        raise InvalidAdapterError(
            f"module {module!r}: A {got[0]} has rank {a_matrix.shape[0]}, but B {got[1]} has rank "
            f"{b_matrix.shape[1]}; expected (r, d_in) and (d_out, r) with the same r",
            module=module,
            got=got,
        )
    return int(a_matrix.shape[0])


def in_one_layout(
    raw: Mapping[str, Any],
    parameters: Mapping[str, str],
    adapters: Mapping[str, LoraAdapter],
    asked: ExpertLayout | None,
) -> OneLayout:
    """Convert the fused experts among `adapters` to peft's current layout.

    `parameters` are their parameter names by module. Layouts of older versions of peft and of
    unsloth are converted, and the configuration is updated to match.
    """
    fused = {module: one for module, one in adapters.items() if one.experts is not None}
    layout = layout_of(raw, asked)
    changed: dict[str, LoraAdapter] = {}
    if layout == "grouped_by_expert":
        changed = {module: _regrouped(one) for module, one in fused.items()}
    exchanged = _exchanged_ones(raw, parameters, fused)
    old = [] if is_kept_swapped(raw) else exchanged
    for module in exchanged:
        one = changed.get(module, fused[module])
        changed[module] = _turned(one) if old else replace(one, layer="exchanged")
    config = dict(raw)
    if changed and (asked or LAYOUT_FIELD in raw):
        config[LAYOUT_FIELD] = "rank_major"
    if old:
        config["peft_version"] = FIRST_RIGHT_VERSION
    return OneLayout(changed, config, _warnings(raw, fused, asked, has_old=bool(old)))


def _exchanged_ones(
    raw: Mapping[str, Any], parameters: Mapping[str, str], fused: Mapping[str, LoraAdapter]
) -> list[str]:
    """Return the modules whose A and B are exchanged."""
    shapes: dict[str, dict[str, tuple[int, int]]] = {}
    for module, adapter in fused.items():
        core, _, leaf = parameters[module].rpartition(".")
        shapes.setdefault(core, {})[leaf] = (adapter.d_in, adapter.d_out)
    turned = {core for core, found in shapes.items() if is_swapped(raw, found)}
    return [module for module in fused if parameters[module].rpartition(".")[0] in turned]


def _regrouped(adapter: LoraAdapter) -> LoraAdapter:
    assert adapter.experts is not None
    return replace(adapter, b_matrix=rank_major(adapter.b_matrix, adapter.experts))


def _turned(adapter: LoraAdapter) -> LoraAdapter:
    assert adapter.experts is not None
    a_matrix, b_matrix = swapped(adapter.a_matrix, adapter.b_matrix, adapter.experts)
    return replace(adapter, a_matrix=a_matrix, b_matrix=b_matrix)


def _warnings(
    raw: Mapping[str, Any],
    fused: Mapping[str, LoraAdapter],
    asked: ExpertLayout | None,
    *,
    has_old: bool,
) -> list[str]:
    found = []
    if has_old:
        found.append(
            "fused experts were stored as by peft before 0.19, with inputs and outputs exchanged; "
            "they were converted"
        )
    if (
        fused
        and asked is None
        and may_be_grouped(raw)
        and any(one.rank > 1 for one in fused.values())
    ):
        found.append(
            "unsloth wrote this adapter, and some versions group the columns of B by expert "
            "without recording it; they were read in peft's order. If outputs are wrong, upload "
            "the adapter again with ?expert_b_layout=grouped_by_expert"
        )
    return found
