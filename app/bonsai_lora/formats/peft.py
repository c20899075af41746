"""PEFT LoRA adapters: the tensors of adapter_model.safetensors as adapters, and back.

Names and shapes: peft 0.21.2, src/peft/tuners/lora/layer.py and src/peft/utils/save_and_load.py.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bonsai_lora.core.adapter import LayerKind, LoraAdapter
from bonsai_lora.core.cast import Array, all_finite
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.names import check_module_name
from bonsai_lora.formats.peft_config import EMBEDDING_LAYERS, PeftConfig, endings, unknown_fields

PREFIX = "base_model.model."

_LORA_KEY = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<ending>\.weight|\.bias)?"
)
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[^.]+)?)(?=\.(?:weight|bias)$)")

Parts = dict[str, str]
"""Part of an adapter (A, B, bias, embedding_A, embedding_B, magnitude) -> tensor name."""


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What an upload holds, checked, and what was passed over on purpose."""

    lora_set: BonsaiLoraSet
    names: Mapping[str, str]
    """Tensor name in the upload -> name in the set's file; those missing were ignored."""
    ignored_keys: list[str]
    warnings: list[str]


def decode_adapter(config: PeftConfig, tensors: Mapping[str, Array], name: str) -> PeftAdapter:
    """Return the set `name` that peft would make of `config` and `tensors` (views are kept).

    Raises UnsupportedAdapterError for tensors that would be applied wrongly or lost,
    InvalidAdapterError where configuration and tensors contradict each other. Reads every tensor
    once, to refuse NaN and infinity.
    """
    modules, others = group_keys(tensors)
    if not modules:
        raise InvalidAdapterError("the adapter has no LoRA tensors: it would change nothing")
    _check_targets(config, modules)
    adapters = {
        module: _decode_module(config, module, parts, tensors) for module, parts in modules.items()
    }
    replacements, ignored = _replacements(config, others, modules)
    for key in [
        *replacements.values(),
        *(key for parts in modules.values() for key in parts.values()),
    ]:
        _check_values(key, tensors[key])
    lora_set = BonsaiLoraSet(
        LoraRegistry(config.lora).add_all(adapters),
        config.base_model_name,
        name,
        {parameter: tensors[key] for parameter, key in replacements.items()},
    )
    canonical = {
        key: tensor_name(module, part)
        for module, parts in modules.items()
        for part, key in parts.items()
    } | {key: PREFIX + parameter for parameter, key in replacements.items()}
    again = group_keys(canonical.values())
    if again[0].keys() != modules.keys() or again[1].keys() != replacements.keys():
        raise InvalidAdapterError("the tensors have names that would mean others when read again")
    return PeftAdapter(lora_set, canonical, ignored, _warnings(config, modules, ignored))


def tensor_name(module: str, part: str) -> str:
    """Return the name that peft gives a part of a module's adapter."""
    endings = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "embedding_A": "lora_embedding_A",
        "embedding_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }
    return f"{PREFIX}{module}.{endings[part]}"


def set_tensors(lora_set: BonsaiLoraSet) -> dict[str, Array]:
    """Return all tensors of a set under peft's names."""
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
    return tensors | {PREFIX + name: one for name, one in lora_set.replacements.items()}


def group_keys(keys: Iterable[str]) -> tuple[dict[str, Parts], dict[str, str]]:
    """Return the adapters' tensor names by module and part, and the other tensors by parameter.

    The prefix `base_model.model.` or `base_model.` and an adapter's name inside the key may be
    there or not. Raises InvalidAdapterError where two keys mean one tensor.
    """
    modules: dict[str, Parts] = {}
    others: dict[str, str] = {}
    adapters: set[str | None] = set()
    for key in keys:
        path = re.sub(r"^base_model\.(model\.)?", "", key)
        match = _LORA_KEY.fullmatch(path)
        part = None if match is None else _part(match["part"], match["ending"])
        place: dict[str, str]
        if match is None or part is None:
            name, place = _WRAPPED.sub("", path), others
        else:
            name, place = part, modules.setdefault(check_module_name(match["module"]), {})
            if part != "magnitude":  # whose name some versions of peft left in
                adapters.add(match["adapter"])
        if name in place:
            raise InvalidAdapterError(
                f"{key!r} and {place[name]!r} are the same tensor", keys=[key, place[name]]
            )
        place[name] = key
    if len(adapters) > 1:
        names = sorted(str(one) for one in adapters)
        raise InvalidAdapterError(f"the keys name several adapters: {', '.join(names[:8])}")
    return modules, others


def encode_config(lora_set: BonsaiLoraSet, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the adapter_config.json of a set: the uploaded one, or one that says the same.

    Scalings that are not alpha / r (rsLoRA) are written as the alpha that gives them.
    """
    if original is not None:
        return dict(original)
    config = lora_set.registry.config
    adapters = lora_set.registry.adapters
    alphas = {name: _exported_alpha(one) for name, one in adapters.items()}
    modules = sorted({name.rpartition(".")[2] for name in adapters}) or list(config.target_modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora_set.base_model_name or None,
        "inference_mode": True,
        "r": max(config.rank, 1),
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": modules,
        "rank_pattern": {
            _pattern_key(name, adapters): one.rank
            for name, one in adapters.items()
            if one.rank != config.rank
        },
        "alpha_pattern": {
            _pattern_key(name, adapters): alpha
            for name, alpha in alphas.items()
            if alpha != config.alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _exported_alpha(adapter: LoraAdapter) -> float:
    # As it is read again: divided in float64, and the quotient rounded to float32.
    if np.float32(adapter.config.alpha / (adapter.rank or 1)) == np.float32(adapter.scaling):
        return adapter.config.alpha
    return adapter.scaling * adapter.rank


def _pattern_key(module: str, modules: Iterable[str]) -> str:
    """Return the pattern for one module: its path, anchored where that would match another's."""
    pattern = re.compile(rf"(.*\.)?({module})$")
    if any(pattern.match(other) for other in modules if other != module):
        return f"^{re.escape(module)}"
    return module


def _part(part: str, ending: str | None) -> str | None:
    """Return which part of an adapter a key is; None where its ending does not belong to it."""
    if part == "lora_A":
        return "A" if ending == ".weight" else None
    if part == "lora_B":
        return {".weight": "B", ".bias": "bias"}.get(ending or "")
    if part == "lora_magnitude_vector":
        return "magnitude" if ending != ".bias" else None
    return part.removeprefix("lora_") if ending is None else None


def _check_targets(config: PeftConfig, modules: Iterable[str]) -> None:
    stray = [module for module in modules if not config.targets(module)]
    if stray:
        raise InvalidAdapterError(
            f"{len(stray)} modules have tensors, but the configuration (target_modules, "
            "exclude_modules, layers_to_transform) does not name them, so peft would not load "
            f"them: {', '.join(stray[:8])}",
            modules=stray[:64],
        )


def _decode_module(
    config: PeftConfig, module: str, parts: Parts, tensors: Mapping[str, Array]
) -> LoraAdapter:
    layer = _layer_kind(module, parts)
    if layer == "embedding" and config.raw.get("lora_bias"):
        raise UnsupportedAdapterError(
            f"module {module!r} is an embedding, for which peft has no lora_bias",
            module=module,
            field="lora_bias",
        )
    embedding = "embedding_" if layer == "embedding" else ""
    a_matrix = tensors[parts[f"{embedding}A"]]
    b_matrix = tensors[parts[f"{embedding}B"]]
    rank, alpha, scaling = config.rank_and_scaling(module)
    _check_factors(module, a_matrix, b_matrix, rank)
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


def _check_factors(module: str, a_matrix: Array, b_matrix: Array, rank: int) -> None:
    got = [list(a_matrix.shape), list(b_matrix.shape)]
    if a_matrix.ndim != 2 or b_matrix.ndim != 2:
        raise InvalidAdapterError(
            f"module {module!r}: A and B have shapes {got[0]} and {got[1]}, not matrices",
            module=module,
            got=got,
        )
    if a_matrix.shape[0] != rank or b_matrix.shape[1] != rank:
        raise InvalidAdapterError(
            f"module {module!r}: A {got[0]} has rank {a_matrix.shape[0]} and B {got[1]} has rank "
            f"{b_matrix.shape[1]}, but the configuration says {rank}",
            module=module,
            got=got,
            expected=rank,
        )


def _vector(
    config: PeftConfig,
    module: str,
    part: str,
    flag: str,
    parts: Parts,
    tensors: Mapping[str, Array],
    d_out: int,
) -> Array | None:
    """Return the vector (d_out,) that goes with `flag`; both must be there, or neither."""
    wanted = bool(config.raw.get(flag))
    if wanted != (part in parts):
        have, say = ("no", "set") if wanted else ("a", "not set")
        raise InvalidAdapterError(
            f"module {module!r} has {have} {part} vector, but {flag} is {say}",
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


def _replacements(
    config: PeftConfig, others: Mapping[str, str], modules: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the replaced parameters (name -> tensor name), and the keys to ignore."""
    adapted = set(modules)
    replaced: dict[str, str] = {}
    ignored, unknown = [], []
    for parameter, key in others.items():
        module, _, kind = parameter.rpartition(".")
        if _is_saved(module, config.modules_to_save) or _is_replaced_bias(
            config, parameter, adapted
        ):
            replaced[parameter] = key
        elif (
            kind == "weight"
            and module.rpartition(".")[2] in EMBEDDING_LAYERS
            and (module in adapted or ".base_layer." in key)
        ):
            ignored.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise UnsupportedAdapterError(
            f"{len(unknown)} tensors are neither LoRA weights nor named by modules_to_save or "
            f"bias, and would be lost: {', '.join(unknown[:8])}",
            keys=unknown[:64],
        )
    return replaced, ignored


def _is_replaced_bias(config: PeftConfig, parameter: str, adapted: set[str]) -> bool:
    module, _, kind = parameter.rpartition(".")
    bias = config.raw.get("bias", "none")
    return kind == "bias" and (bias == "all" or (bias == "lora_only" and module in adapted))


def _is_saved(module: str, names: list[str]) -> bool:
    """Whether `module` or one around it ends with a name in modules_to_save, as peft asks."""
    parts = module.split(".")
    around = [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]
    return any(path.endswith(name) for path in around for name in names)


def _check_values(key: str, tensor: Array) -> None:
    if tensor.dtype.itemsize == 8:
        raise UnsupportedAdapterError(f"tensor {key!r} is F64; expected F32, F16 or BF16", key=key)
    if not all_finite(tensor):
        raise InvalidAdapterError(f"tensor {key!r} holds NaN or infinity", key=key)


def _warnings(config: PeftConfig, modules: Iterable[str], ignored: list[str]) -> list[str]:
    found = unknown_fields(config)
    names = config.raw.get("target_modules")
    if isinstance(names, list):
        present = {ending for module in modules for ending in endings(module)}
        absent = sorted(set(names) - present - set(config.modules_to_save))
        found += [f"target_modules names {name!r}, which has no tensors" for name in absent[:64]]
    if ignored:
        found.append(
            "copies of base embeddings were ignored; where the vocabulary was resized, name the "
            "layer in modules_to_save"
        )
    if config.raw.get("fan_in_fan_out"):
        found.append("fan_in_fan_out is taken as false, as peft does for linear layers")
    return found
