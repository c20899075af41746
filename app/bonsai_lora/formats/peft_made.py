"""A PEFT configuration for an adapter of a different format."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bonsai_lora.formats.peft_patterns import keys_of


def made_config(
    base_model_name: str | None,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    use_dora: bool = False,
) -> dict[str, Any]:
    """Return the configuration in which each module has its rank and alpha, and so its scaling.

    `ranks` and `alphas` are by module, at least one.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas[name] for name, one in ranks.items() if one == rank).most_common(1)[0][0]
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
        "use_dora": use_dora,
        "use_rslora": False,
    }
