"""The adapter_config.json of a set that was computed from several others."""

from collections.abc import Mapping, Sequence
from typing import Any

from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import UnsupportedAdapterError
from bonsai_lora.formats.experts import targeted_parameters
from bonsai_lora.formats.peft_made import made_config
from bonsai_lora.formats.peft_options import BaseOptions

Sources = Sequence[tuple[BonsaiLoraSet, Mapping[str, Any] | None]]
"""Sets with their configurations, if they were uploaded."""


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
    config = made_config(
        lora_set.base_model_name or None,
        {name: one.rank for name, one in named.items()},
        {name: one.config.alpha for name, one in named.items()},
        (usual.rank, usual.alpha),
    )
    targets = dict.fromkeys(name for one in options for name in one.target_parameters)
    if targeted_parameters(targets, adapters) != parameters:
        raise UnsupportedAdapterError(
            "the sets adapt different parameters of the same fused experts; use sets with the "
            "same target_parameters"
        )
    return config | {
        "fan_in_fan_out": is_transposed,
        "target_modules": sorted(
            {name.rpartition(".")[2] for name in adapters if name not in parameters}
        ),
        "target_parameters": list(targets) or None,
    }
