"""adapter_config.json of sets that came without one: converted, combined or extracted."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import UnsupportedAdapterError
from bonsai_lora.formats.peft_keys import TOKEN_ROWS
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.formats.peft_patterns import keys_of

Sources = Sequence[tuple[BonsaiLoraSet, Mapping[str, Any] | None]]
"""Sets with their configurations, if they were uploaded."""


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


def adapted_parameters(sources: Sources) -> Mapping[str, str]:
    """Return the parameter that each module of fused experts adapts in all of the sets.

    Raises UnsupportedAdapterError if a module means different parameters in different sets.
    """
    found: dict[str, str] = {}
    for lora_set, config in sources:
        own = BaseOptions.of(config).parameters_of(lora_set.registry.adapters)
        for module in lora_set.registry.adapters:
            parameter = own.get(module, module)
            if found.setdefault(module, parameter) != parameter:
                raise UnsupportedAdapterError(
                    f"module {module!r} adapts {found[module]!r} in one set and {parameter!r} in "
                    f"{lora_set.adapter_name!r}; use sets with the same target_parameters",
                    module=module,
                )
    return {module: one for module, one in found.items() if one != module}


def combined_config(lora_set: BonsaiLoraSet, sources: Sources) -> dict[str, Any] | None:
    """Return the configuration of `lora_set`; None if that of a plain set says all.

    Raises UnsupportedAdapterError as `adapted_parameters` does.
    """
    parameters = adapted_parameters(sources)
    options = [BaseOptions.of(config) for _, config in sources]
    is_transposed = any(one.is_transposed for one in options)
    if not parameters and not is_transposed:
        return None
    adapters = lora_set.registry.adapters
    named = {parameters.get(module, module): one for module, one in adapters.items()}
    usual = lora_set.registry.config
    made = made_config(
        lora_set.base_model_name or None,
        {name: one.rank for name, one in named.items()},
        {name: one.config.alpha for name, one in named.items()},
        (usual.rank, usual.alpha),
    )
    targets = dict.fromkeys(name for one in options for name in one.target_parameters)
    config = made | {
        "fan_in_fan_out": is_transposed,
        "target_modules": sorted(
            {name.rpartition(".")[2] for name in adapters if name not in parameters}
        ),
        "target_parameters": list(targets) or None,
    }
    if BaseOptions.of(config).parameters_of(adapters) != parameters:
        raise UnsupportedAdapterError(
            "the sets adapt different parameters of the same fused experts; use sets with the "
            "same target_parameters"
        )
    return config


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
