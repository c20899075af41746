"""The adapter_config.json of a set that was extracted from a fine-tuned model."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.formats.peft_keys import TOKEN_ROWS
from bonsai_lora.formats.peft_made import made_config


def extracted_config(
    base_model_name: str,
    adapters: Mapping[str, LoraAdapter],
    replaced: Collection[str],
    token_rows: Mapping[str, Sequence[int]],
    modules: Collection[str],
    *,
    is_transposed: bool,
) -> dict[str, Any]:
    """Return the configuration with which peft loads the set as it is.

    `replaced` are the names of replaced parameters, `token_rows` row numbers by module, and
    `modules` all modules of the base.
    """
    ranks = {name: one.rank for name, one in adapters.items()} or {"": 1}
    alphas = {name: one.config.alpha for name, one in adapters.items()} or {"": 1.0}
    biases = [name for name in replaced if name.endswith(".bias")]
    is_bias_of_adapted = any(name.removesuffix(".bias") in adapters for name in biases)
    saved = dict.fromkeys(
        name.rpartition(".")[0]
        for name in replaced
        if not name.endswith(TOKEN_ROWS) and name.removesuffix(".bias") not in adapters
    )
    return made_config(base_model_name or None, ranks, alphas) | {
        # peft refuses an empty list, and takes None if only token rows are trained.
        "target_modules": _targets(adapters, modules) or None,
        "modules_to_save": list(saved) or None,
        "bias": "lora_only" if is_bias_of_adapted else "none",
        "fan_in_fan_out": is_transposed,
        "trainable_token_indices": {name: list(rows) for name, rows in token_rows.items()} or None,
    }


def _targets(adapted: Collection[str], modules: Collection[str]) -> list[str]:
    """Return the last parts of the adapted modules, or whole paths where others share them."""
    others = {name.rpartition(".")[2] for name in modules if name not in adapted}
    return sorted(
        {name if (last := name.rpartition(".")[2]) in others else last for name in adapted}
    )
