"""A PEFT configuration for adapters that no configuration was uploaded with."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bonsai_lora.formats.peft_patterns import keys_of


def made_config(
    base_model_name: str | None,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    usual: tuple[int, float] | None = None,
) -> dict[str, Any]:
    """Return the configuration in which each module has its rank and alpha, and so its scaling.

    `ranks` and `alphas` are by module. `usual` are the rank and the alpha that need no pattern; by
    default the most common ones, of at least one module.
    """
    rank, alpha = usual or _most_common(ranks, alphas)
    keys = keys_of(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "rank_pattern": {keys[name]: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {keys[name]: one for name, one in alphas.items() if one != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _most_common(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> tuple[int, float]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas[name] for name, one in ranks.items() if one == rank).most_common(1)[0][0]
    return rank, alpha
