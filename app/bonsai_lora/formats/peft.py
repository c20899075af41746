"""PEFT LoRA adapters: the tensors of adapter_model.safetensors as adapters, and back.

Names and shapes: peft 0.21.2, src/peft/tuners/lora/layer.py and src/peft/utils/save_and_load.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bonsai_lora.core.adapter import LayerKind, LoraAdapter, find_transposed
from bonsai_lora.core.cast import Array, all_finite
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError, counted
from bonsai_lora.formats.experts import ExpertLayout
from bonsai_lora.formats.foreign import check_keys, check_no_other_method
from bonsai_lora.formats.fused import decode_experts, in_one_layout, rank_of
from bonsai_lora.formats.made_config import made_config
from bonsai_lora.formats.names import endings
from bonsai_lora.formats.peft_config import PeftConfig, Scaling, unknown_fields
from bonsai_lora.formats.peft_keys import (
    TOKEN_ROWS,
    Keys,
    Parts,
    group_keys,
    parameter_names,
    sort_uploaded,
    tensor_name,
)

GGUF_ARCHITECTURE = "gguf_architecture"
"""Field of the stored configuration of a GGUF LoRA: whose tensor names it had. Never exported."""


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """A checked upload, and what was deliberately ignored."""

    lora_set: BonsaiLoraSet
    config: Mapping[str, Any]
    """The adapter_config.json of the set."""
    names: Mapping[str, str]
    """Tensor name in the upload -> name in the set's file; those missing were ignored."""
    is_as_it_came: bool
    """Whether the set has exactly the tensors of the upload, unchanged."""
    ignored_keys: list[str]
    warnings: list[str]


def decode_adapter(
    config: PeftConfig,
    tensors: Mapping[str, Array],
    name: str,
    expert_layout: ExpertLayout | None = None,
) -> PeftAdapter:
    """Return the set `name` that peft would load from `config` and `tensors` (views are kept).

    `expert_layout` overrides the configured column order of B for fused experts. Reads every tensor
    once to refuse NaN and infinity. Raises UnsupportedAdapterError for tensors that would be
    applied wrongly or lost, InvalidAdapterError if configuration and tensors contradict each other.
    """
    check_keys(tensors)
    check_not_empty(tensors)
    keys = sort_uploaded(tensors)
    if not keys.modules and not any(one.endswith(TOKEN_ROWS) for one in keys.parameters):
        check_no_other_method(tensors)
        raise _no_adapter(tensors)
    parameters = config.options.parameters_of(keys.modules)
    _check_targets(config, keys.modules.keys() - parameters.keys(), keys, tensors)
    replaced, ignored = _replacements(config, keys)
    _check_token_rows(config, {one: tensors[key] for one, key in replaced.items()})
    canonical = _canonical_names(keys, replaced)
    for key in canonical:
        _check_values(key, tensors[key])
    scalings = config.scalings(parameters.get(module, module) for module in keys.modules)
    adapters = {
        module: decode_experts(config, scalings[parameters[module]], module, parts, tensors)
        if module in parameters
        else _decode_module(config, scalings[module], module, parts, tensors)
        for module, parts in keys.modules.items()
    }
    fused = in_one_layout(config.raw, parameters, adapters, expert_layout)
    lora_set = BonsaiLoraSet(
        LoraRegistry(config.lora).add_all({**adapters, **fused.adapters}),
        config.base_model_name,
        name,
        {parameter: tensors[key] for parameter, key in replaced.items()},
    )
    warnings = [*_warnings(config, keys, replaced), *fused.warnings]
    as_it_came = not (ignored or fused.adapters)
    return PeftAdapter(lora_set, fused.config, canonical, as_it_came, ignored, warnings)


def _canonical_names(keys: Keys, replaced: Mapping[str, str]) -> dict[str, str]:
    """Return the name in the set's file of each tensor in use; raises unless it is unique."""
    names = parameter_names(replaced, keys.modules)
    canonical = {
        key: tensor_name(module, part)
        for module, parts in keys.modules.items()
        for part, key in parts.items()
    } | {key: names[parameter] for parameter, key in replaced.items()}
    again = group_keys(canonical.values())
    if again[0].keys() != keys.modules.keys() or again[1].keys() != replaced.keys():
        raise InvalidAdapterError(
            "the tensor names are ambiguous: they would be read differently after an export; save "
            "the adapter again with peft"
        )
    return canonical


def set_tensors(lora_set: BonsaiLoraSet) -> dict[str, Array]:
    """Return all tensors of a set by peft's names."""
    tensors: dict[str, Array] = {}
    for module, adapter in lora_set.registry.adapters.items():
        embedding = "embedding_" if adapter.layer == "embedding" else ""
        parts = {
            f"{embedding}A": adapter.a_matrix,
            f"{embedding}B": adapter.b_matrix,
            "bias": adapter.bias,
            "magnitude": adapter.magnitude,
        }
        tensors |= {
            tensor_name(module, part): one for part, one in parts.items() if one is not None
        }
    names = parameter_names(lora_set.replacements, lora_set.registry.adapters)
    return tensors | {names[name]: one for name, one in lora_set.replacements.items()}


def encode_config(lora_set: BonsaiLoraSet, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the adapter_config.json of a set: the uploaded one, or an equivalent one.

    A scaling that is not alpha / r (rsLoRA) is written as the alpha that yields it.
    """
    if original is not None:
        return {key: one for key, one in original.items() if key != GGUF_ARCHITECTURE}
    config = lora_set.registry.config
    adapters = lora_set.registry.adapters
    alphas = {name: _exported_alpha(one) for name, one in adapters.items()}
    ranks = {name: one.rank for name, one in adapters.items()}
    usual = config.rank, config.alpha
    made = made_config(lora_set.base_model_name or None, ranks, alphas, usual)
    return made | {
        "r": max(config.rank, 1),
        "lora_dropout": config.dropout,
        "target_modules": made["target_modules"] or list(config.target_modules),
    }


def _exported_alpha(adapter: LoraAdapter) -> float:
    # As on import: divided in float64, and the quotient rounded to float32.
    if np.float32(adapter.config.alpha / (adapter.rank or 1)) == np.float32(adapter.scaling):
        return adapter.config.alpha
    return adapter.scaling * adapter.rank


def _no_adapter(keys: Iterable[str]) -> InvalidAdapterError:
    odd = next((key for key in keys if "lora_" in key.lower()), None)
    if odd is not None:
        return InvalidAdapterError(
            f"tensor names such as {odd[:200]!r} are not those of PEFT, which end in "
            ".lora_A.weight and .lora_B.weight; save the adapter with peft",
            key=odd[:200],
        )
    return InvalidAdapterError(
        "the file has no LoRA tensors (lora_A, lora_B), so it is not an adapter; send "
        "adapter_model.safetensors as PEFT saved it, not a full model"
    )


def _check_targets(
    config: PeftConfig, modules: Iterable[str], keys: Keys, tensors: Mapping[str, Array]
) -> None:
    stray = [module for module in modules if not config.targets(module)]
    if stray and config.raw.get("ensure_weight_tying"):
        tied = _tied_heads(stray, keys, tensors)
        stray = [module for module in stray if module not in tied]
    if stray:
        raise InvalidAdapterError(
            f"target_modules, exclude_modules and layers_to_transform do not select "
            f"{counted(len(stray), 'module')} with tensors, so peft would not load them: "
            f"{', '.join(stray[:8])}; correct the configuration",
            modules=stray[:64],
        )


def _tied_heads(
    modules: Iterable[str], keys: Keys, tensors: Mapping[str, Array]
) -> Mapping[str, str]:
    """Return those for which peft saved A and B of an embedding once more, transposed."""
    parts = keys.modules
    heads = {
        one: (tensors[parts[one]["A"]], tensors[parts[one]["B"]])
        for one in modules
        if parts[one].keys() == {"A", "B"}
    }
    embeddings = {
        module: (tensors[own["embedding_A"]], tensors[own["embedding_B"]])
        for module, own in parts.items()
        if {"embedding_A", "embedding_B"} <= own.keys()
    }
    return find_transposed(heads, embeddings)


def _decode_module(
    config: PeftConfig, says: Scaling, module: str, parts: Parts, tensors: Mapping[str, Array]
) -> LoraAdapter:
    layer = _layer_kind(module, parts)
    if layer == "embedding" and config.raw.get("lora_bias"):
        raise UnsupportedAdapterError(
            f"module {module!r} is an embedding, for which peft has no lora_bias; set it to false",
            module=module,
            field="lora_bias",
        )
    embedding = "embedding_" if layer == "embedding" else ""
    a_matrix = tensors[parts[f"{embedding}A"]]
    b_matrix = tensors[parts[f"{embedding}B"]]
    rank = rank_of(module, a_matrix, b_matrix)
    alpha, scaling = says.of(module, rank)
    vectors = {}
    for part, flag in (("bias", "lora_bias"), ("magnitude", "use_dora")):
        vectors[part] = _vector(config, module, part, flag, parts, tensors, len(b_matrix))
    own = LoraConfig(rank, alpha, config.lora.dropout, config.lora.target_modules)
    return LoraAdapter(
        own, a_matrix, b_matrix, scaling, vectors["bias"], vectors["magnitude"], layer
    )


def _layer_kind(module: str, parts: Parts) -> LayerKind:
    halves = parts.keys() & {"A", "B", "embedding_A", "embedding_B"}
    if halves == {"embedding_A", "embedding_B"}:
        return "embedding"
    if halves != {"A", "B"}:
        raise InvalidAdapterError(
            f"module {module!r} has {', '.join(sorted(parts.values()))}; expected both lora_A and "
            "lora_B",
            module=module,
        )
    return "linear"


def _vector(
    config: PeftConfig,
    module: str,
    part: str,
    flag: str,
    parts: Parts,
    tensors: Mapping[str, Array],
    d_out: int,
) -> Array | None:
    """Return the vector (d_out,) that `flag` requires; raises if only one of the two is given."""
    wanted = bool(config.raw.get(flag))
    if wanted != (part in parts):
        have, say = ("no", "set") if wanted else ("a", "not set")
        raise InvalidAdapterError(
            f"module {module!r} has {have} {part} vector, but {flag} is {say}; correct {flag}",
            module=module,
            field=flag,
        )
    if not wanted:
        return None
    vector = tensors[parts[part]]
    if vector.shape != (d_out,):
        raise InvalidAdapterError(
            f"the {part} vector of {module!r} has shape {list(vector.shape)}; expected {[d_out]}",
            module=module,
            got=list(vector.shape),
            expected=[d_out],
        )
    return vector


def _replacements(config: PeftConfig, keys: Keys) -> tuple[dict[str, str], list[str]]:
    """Return the replaced parameters (name -> tensor name), and the keys to ignore.

    peft loads every tensor that is named like a parameter of its model, so the resized embeddings
    that it saves automatically replace those of the base.
    """
    replaced: dict[str, str] = {}
    unknown = []
    for parameter, key in keys.parameters.items():
        module, _, kind = parameter.rpartition(".")
        is_bias = kind == "bias" and config.replaces_bias(is_adapted=module in keys.modules)
        if (
            is_bias
            or parameter.endswith(TOKEN_ROWS)
            or config.is_saved(module)
            or _is_loaded(key, parameter, keys)
        ):
            replaced[parameter] = key
        else:
            unknown.append(key)
    if unknown:
        raise UnsupportedAdapterError(
            f"peft would not load {counted(len(unknown), 'tensor')}, which would be lost: neither "
            "LoRA weights, nor a module's weight, nor what modules_to_save or bias names: "
            f"{', '.join(unknown[:8])}; remove them, or save the adapter again with peft",
            keys=unknown[:64],
        )
    return replaced, keys.originals


def _check_token_rows(config: PeftConfig, replaced: Mapping[str, Array]) -> None:
    """Raise InvalidAdapterError if rows and trainable_token_indices contradict each other."""
    modules = [one.removesuffix(TOKEN_ROWS) for one in replaced if one.endswith(TOKEN_ROWS)]
    if config.options.token_indices and not modules:
        raise InvalidAdapterError(
            "trainable_token_indices is set, but the file has no trainable_tokens_delta; save the "
            "adapter again",
            field="trainable_token_indices",
        )
    for module in modules:
        rows = replaced[module + TOKEN_ROWS]
        count = len(config.options.rows_of(module))
        if rows.ndim != 2 or len(rows) != count:
            raise InvalidAdapterError(
                f"the token rows of {module!r} have shape {list(rows.shape)}, but "
                f"trainable_token_indices lists {counted(count, 'row')}; correct "
                "trainable_token_indices",
                module=module,
                got=list(rows.shape),
            )


def _is_loaded(key: str, parameter: str, keys: Keys) -> bool:
    """Return whether a key is that of a weight in peft's wrapped model, or of its bias."""
    module, _, kind = parameter.rpartition(".")
    if "lora_" in key:  # peft takes it for a part of an adapter
        return False
    if (module in keys.modules) != (".base_layer." in key and ".token_adapter." not in key):
        return False
    return kind == "weight" or (kind == "bias" and f"{module}.weight" in keys.parameters)


def check_not_empty(tensors: Mapping[str, Array]) -> None:
    """Raise InvalidAdapterError, with the names, if tensors have no elements."""
    empty = [f"{key} {list(one.shape)}" for key, one in tensors.items() if one.size == 0]
    if empty:
        raise InvalidAdapterError(
            f"{len(empty)} of {len(tensors)} tensors are empty: {', '.join(empty[:4])}. DeepSpeed "
            "ZeRO-3 and FSDP leave such placeholders if the shards are not gathered before saving; "
            "gather them (stage3_gather_16bit_weights_on_model_save, or "
            "accelerator.get_state_dict) and save the adapter again",
            keys=empty[:64],
        )


def _check_values(key: str, tensor: Array) -> None:
    if tensor.dtype.itemsize == 8:
        raise UnsupportedAdapterError(f"tensor {key!r} is F64; expected F32, F16 or BF16", key=key)
    if not all_finite(tensor):
        raise InvalidAdapterError(
            f"tensor {key!r} has NaN or infinity; check the training run", key=key
        )


def _warnings(config: PeftConfig, keys: Keys, replaced: Mapping[str, str]) -> list[str]:
    found = unknown_fields(config)
    names = config.raw.get("target_modules")
    if isinstance(names, list):
        present = {ending for module in keys.modules for ending in endings(module)}
        absent = sorted(set(names) - present - set(config.modules_to_save))
        found += [f"target_modules names {name!r}, which has no tensors" for name in absent[:64]]
    loaded = [one for one in replaced if _is_loaded(replaced[one], one, keys)]
    unasked = [one for one in loaded if not config.is_saved(one.rpartition(".")[0])]
    if unasked:
        found.append(
            f"the adapter replaces {counted(len(unasked), 'parameter')} of the base, as when peft "
            f"loads it (it saves them after the vocabulary was resized): {', '.join(unasked[:8])}"
        )
    if keys.wrappers:
        found.append(
            "names of model wrappers were removed from the keys: "
            + ", ".join(sorted(keys.wrappers))
        )
    return found
