"""Find the base tensors that fused experts change: one per expert, or one for all.

Checkpoints store experts separately (`experts.7.gate_proj.weight`), or stacked in one tensor as the
model class does (transformers 5, Qwen3MoeExperts and others).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bonsai_lora.checkpoints.base import Base
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.errors import ShapeMismatchError, counted

_SPLIT = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Fused parameters -> the separate tensors of an expert, in the order of their outputs."""
_OLD_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Mixtral's names."""


def expert_weights(
    base: Base, parameter: str, adapter: LoraAdapter, match: str | None
) -> Iterator[tuple[str, LoraAdapter]]:
    """Yield the name of each tensor of `base` that holds part of `parameter`, and its adapter.

    Yields nothing if the base has no such tensor. Raises InvalidRequestError for ambiguous names,
    and ShapeMismatchError if the base has a different number of experts.
    """
    stacked = base.paths.find_one(parameter, match)
    if stacked is not None:
        yield stacked, adapter
        return
    core, _, leaf = parameter.rpartition(".")
    first = _find_first(base, core, _SPLIT.get(leaf, (leaf,))[0], match)
    if first is None:
        return
    stack, _, own_name, _ = first.rsplit(".", 3)
    renamed = _OLD_NAMES if own_name in _OLD_NAMES.values() else {}
    for number, expert in enumerate(adapter.each_expert):
        for name, part in split_outputs(leaf, expert):
            tensor = f"{stack}.{number}.{renamed.get(name, name)}.weight"
            if tensor not in base.tensor_names:
                raise _another_count(base, core, adapter, f"has no expert {number}")
            yield tensor, part
    count = len(adapter.each_expert)
    if f"{stack}.{count}.{own_name}.weight" in base.tensor_names:
        raise _another_count(base, core, adapter, f"has an expert {count}")


def _find_first(base: Base, core: str, name: str, match: str | None) -> str | None:
    """Return the tensor `name` of the first expert."""
    return base.paths.find_one(f"{core}.0.{name}.weight", match) or base.paths.find_one(
        f"{core}.0.{_OLD_NAMES.get(name, name)}.weight", match
    )


def _another_count(base: Base, core: str, adapter: LoraAdapter, what: str) -> ShapeMismatchError:
    return ShapeMismatchError(
        f"the set is for {counted(len(adapter.each_expert), 'expert')} in {core!r}, but base "
        f"{base.name!r} {what}; merge it into the model that it was trained on",
        module=core,
        base=base.name,
    )


def split_outputs(leaf: str, expert: LoraAdapter) -> Sequence[tuple[str, LoraAdapter]]:
    """Return the separate tensors of an expert that the fused parameter `leaf` holds."""
    names = _SPLIT.get(leaf, (leaf,))
    rows = expert.d_out // len(names)
    return [
        (
            name,
            replace(
                expert,
                b_matrix=expert.b_matrix[place * rows : (place + 1) * rows],
                layer="linear",
            ),
        )
        for place, name in enumerate(names)
    ]
