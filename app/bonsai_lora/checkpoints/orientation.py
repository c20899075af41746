"""Which way round a base stores the weight that an adapter changes.

Linear stores (out, in), Conv1D of GPT-2 and its relatives (in, out). peft decides by the layer's
class and writes what it saw last as fan_in_fan_out (peft 0.21, tuners/lora/model.py); a base here
has no classes, but a type, names and shapes.
"""

from collections.abc import Iterable
from dataclasses import replace

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.errors import UnsupportedAdapterError

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Values of model_type whose blocks are made of Conv1D (transformers 5)."""
TRANSPOSED_TYPES = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""Values of model_type whose experts are stacked (E, in, out) in one tensor."""
CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""What those models call such layers."""

Fit = tuple[str, LoraAdapter, tuple[int, ...]]
"""Module, its adapter, and the shape of the base's tensor."""


def transposed(adapter: LoraAdapter) -> LoraAdapter:
    """Return the same adapter for a weight that is stored (d_in, d_out)."""
    return replace(adapter, layer="conv1d")


def is_conv1d_name(module: str) -> bool:
    """Whether a layer of this name is a Conv1D where the model has any."""
    return module.rpartition(".")[2] in CONV1D_NAMES


def is_any_transposed(fits: Iterable[Fit]) -> bool | None:
    """Return whether oblong weights are stored (d_in, d_out); None where nothing shows it."""
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
    """Return the adapter of a fit for the way the base stores its weight.

    `may_be_transposed` is fan_in_fan_out, `others_are` what oblong weights show. Raises
    UnsupportedAdapterError for a square weight where nothing tells.
    """
    module, adapter, shape = fit
    if adapter.layer != "linear":
        return adapter
    if adapter.experts is not None:
        return _as_stacked(adapter, shape, model_type)
    is_transposed = _is_transposed(fit, model_type, may_be_transposed, others_are)
    if is_transposed is None:
        raise UnsupportedAdapterError(
            f"the adapter says fan_in_fan_out, and the weight of {module!r} is square, so nothing "
            "tells whether the base stores it (in, out) or (out, in); give the base a config.json "
            "with its model_type, or set fan_in_fan_out to false where its layers are linear",
            module=module,
            field="fan_in_fan_out",
        )
    return transposed(adapter) if is_transposed else adapter


def _as_stacked(adapter: LoraAdapter, shape: tuple[int, ...], model_type: str) -> LoraAdapter:
    """Return fused experts for the way a base stacks their weights in one tensor."""
    if adapter.d_in == adapter.d_out:
        return transposed(adapter) if model_type in TRANSPOSED_TYPES else adapter
    is_transposed = shape == (adapter.experts, adapter.d_in, adapter.d_out)
    return transposed(adapter) if is_transposed else adapter


def _is_transposed(
    fit: Fit,
    model_type: str,
    may_be_transposed: bool,  # noqa: FBT001
    others_are: bool | None,  # noqa: FBT001
) -> bool | None:
    """Return whether the weight is stored (d_in, d_out), None where nothing tells."""
    module, adapter, shape = fit
    has_name = is_conv1d_name(module)
    if model_type in CONV1D_TYPES or not may_be_transposed:
        return model_type in CONV1D_TYPES and has_name
    if adapter.d_in != adapter.d_out:
        return shape == (adapter.d_in, adapter.d_out)
    if others_are is not None:
        return others_are and has_name
    return False if model_type and not has_name else None
