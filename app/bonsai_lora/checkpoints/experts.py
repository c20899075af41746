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
    first = _SPLIT.get(leaf, (leaf,))[0]
    if _find(base, core, 0, first, match) is None:
        return
    for number, expert in enumerate(adapter.each_expert):
        for name, part in split_outputs(leaf, expert):
            found = _find(base, core, number, name, match)
            if found is None:
                raise _another_count(base, core, adapter, f"has no expert {number}")
            yield found, part
    if _find(base, core, adapter.experts or 1, first, match) is not None:
        raise _another_count(base, core, adapter, f"has an expert {adapter.experts or 1}")


def _another_count(base: Base, core: str, adapter: LoraAdapter, what: str) -> ShapeMismatchError:
    return ShapeMismatchError(
        f"the set is for {counted(adapter.experts or 1, 'expert')} in {core!r}, but base "
        f"{base.name!r} {what}; merge it into the model that it was trained on",
        module=core,
        base=base.name,
    )


def _find(base: Base, core: str, number: int, name: str, match: str | None) -> str | None:
    return base.paths.find_one(f"{core}.{number}.{name}.weight", match) or base.paths.find_one(
        f"{core}.{number}.{_OLD_NAMES.get(name, name)}.weight", match
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
