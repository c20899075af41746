"""Decide whether a base stores a weight as (out, in) or (in, out).

Linear layers store (out, in), the Conv1D layers of GPT-2 and its relatives (in, out). peft goes by
the layer's class, and records the last one it saw as fan_in_fan_out (peft 0.21,
tuners/lora/model.py). A checkpoint has no classes, only a model type, names and shapes.
"""

from collections.abc import Iterable
from dataclasses import replace

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.errors import UnsupportedAdapterError

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Values of model_type whose blocks consist of Conv1D layers (transformers 5)."""
TRANSPOSED_TYPES = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""Values of model_type with stacked experts (E, in, out)."""
CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Names of Conv1D layers in these models."""

Fit = tuple[str, LoraAdapter, tuple[int, ...]]
"""Module, adapter, and shape of the base tensor."""


def transposed(adapter: LoraAdapter) -> LoraAdapter:
    """Return the adapter for a weight stored as (d_in, d_out)."""
    return replace(adapter, layer="conv1d")


def is_conv1d_name(module: str) -> bool:
    """Return whether a layer with this name is a Conv1D in models that have them."""
    return module.rpartition(".")[2] in CONV1D_NAMES


def is_any_transposed(fits: Iterable[Fit]) -> bool | None:
    """Return whether non-square weights are stored as (d_in, d_out); None if undecided."""
    found = {
        shape == (adapter.d_in, adapter.d_out)
        for _, adapter, shape in fits
        if adapter.layer == "linear"
        and adapter.d_in != adapter.d_out
        and shape in ((adapter.d_in, adapter.d_out), (adapter.d_out, adapter.d_in))
    }
    return found.pop() if len(found) == 1 else None


def as_stored(
    fit: Fit, model_type: str, *, may_be_transposed: bool, others_are: bool | None
) -> LoraAdapter:
    """Return the adapter in the orientation in which the base stores its weight.

    `may_be_transposed` is fan_in_fan_out, `others_are` the result of `is_any_transposed`. Raises
    UnsupportedAdapterError for a square weight whose orientation is unknown.
    """
    module, adapter, shape = fit
    if adapter.layer != "linear":
        return adapter
    if adapter.experts is not None:
        return _as_stacked(adapter, shape, model_type)
    is_transposed = _is_transposed(
        fit, model_type, may_be_transposed=may_be_transposed, others_are=others_are
    )
    if is_transposed is None:
        raise UnsupportedAdapterError(
            f"fan_in_fan_out is set and the weight of {module!r} is square, so it is unknown "
            "whether the base stores it as (in, out) or (out, in); add a config.json with "
            "model_type to the base, or set fan_in_fan_out to false if its layers are linear",
            module=module,
            field="fan_in_fan_out",
        )
    return transposed(adapter) if is_transposed else adapter


def _as_stacked(adapter: LoraAdapter, shape: tuple[int, ...], model_type: str) -> LoraAdapter:
    """Return fused experts in the orientation in which the base stacks their weights."""
    if adapter.d_in == adapter.d_out:
        return transposed(adapter) if model_type in TRANSPOSED_TYPES else adapter
    is_transposed = shape == (adapter.experts, adapter.d_in, adapter.d_out)
    return transposed(adapter) if is_transposed else adapter


def _is_transposed(
    fit: Fit, model_type: str, *, may_be_transposed: bool, others_are: bool | None
) -> bool | None:
    """Return whether the weight is stored as (d_in, d_out); None if unknown."""
    module, adapter, shape = fit
    has_name = is_conv1d_name(module)
    if model_type in CONV1D_TYPES or not may_be_transposed:
        return model_type in CONV1D_TYPES and has_name
    if adapter.d_in != adapter.d_out:
        return shape == (adapter.d_in, adapter.d_out)
    if others_are is not None:
        return others_are and has_name
    return False if model_type and not has_name else None
