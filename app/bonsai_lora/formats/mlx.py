"""Convert MLX adapters (adapters.safetensors, adapter_config.json of mlx_lm) to PEFT.

Layouts: mlx_lm 0.32, tuner/lora.py and tuner/dora.py. lora_a is (d_in, r), lora_b (r, d_out), and
`scale` is the factor itself, not alpha. For fused experts lora_a is (E, r, d_in) and lora_b
(E, d_out, r). `m` of DoRA is peft's magnitude vector.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bonsai_lora.core.cast import Array
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.made_config import made_config
from bonsai_lora.formats.peft import check_not_empty
from bonsai_lora.formats.peft_keys import PREFIX, tensor_name

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"})
_EXPERTS = re.compile(r"(.+\.(mlp|block_sparse_moe))\.switch_mlp\.(\w+)")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Names of MLX -> those of the class, under `block_sparse_moe` (mlx_lm, models/mixtral.py)."""
_PARTS = ("lora_a", "lora_b", "m")

Factors = dict[str, Array]
"""lora_a, lora_b and, for DoRA, m of one module."""


def is_mlx(raw: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Return whether the configuration and tensor names are those of an MLX adapter."""
    if "peft_type" in raw:
        return False
    marks = {"fine_tune_type", "lora_parameters", "lora_layers"}
    return not marks.isdisjoint(raw) or any(key.endswith((".lora_a", ".lora_b")) for key in keys)


def decode_mlx(
    raw: Mapping[str, Any], tensors: Mapping[str, Array]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the PEFT configuration and tensors that are equivalent to an MLX adapter.

    Arrays are views. Raises UnsupportedAdapterError for what PEFT cannot express,
    InvalidAdapterError if configuration and tensors contradict each other.
    """
    scale = _scale(raw)
    check_not_empty(tensors)
    modules, others = _group(tensors)
    if not modules:
        raise InvalidAdapterError(
            "the file has no lora_a and lora_b, so it is not an MLX adapter but perhaps a full "
            "fine-tune; train with fine_tune_type lora or dora"
        )
    found = {PREFIX + key: tensors[key] for key in others}
    ranks: dict[str, int] = {}
    for module, factors in modules.items():
        for name, parts in _as_peft(module, factors):
            found |= {tensor_name(name, part): one for part, one in parts.items()}
            ranks[name] = len(parts["A"] if "A" in parts else parts["embedding_A"])
    model = raw.get("model")
    config = made_config(
        model if isinstance(model, str) else None,
        ranks,
        {name: scale * rank for name, rank in ranks.items()},
    )
    config["use_dora"] = any("m" in one for one in modules.values())
    return config, found


def _scale(raw: Mapping[str, Any]) -> float:
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(
            f"fine_tune_type is {str(kind)[:100]!r}; expected lora or dora",
            field="fine_tune_type",
        )
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        raise InvalidAdapterError(
            "adapter_config.json of this MLX adapter has no lora_parameters.scale, the factor of "
            "its deltas; send the adapter_config.json that mlx_lm saved with it",
            field="lora_parameters",
        )
    if "alpha" in parameters:
        raise UnsupportedAdapterError(
            "lora_parameters has both alpha and scale: early versions of mlx_lm multiply by alpha, "
            "later ones ignore it; remove alpha and set scale to the factor used in training",
            field="lora_parameters",
        )
    scale = parameters["scale"]
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise InvalidAdapterError(
            f"lora_parameters.scale is {str(scale)[:100]}; expected a finite number",
            field="lora_parameters",
        )
    return float(scale)


def _group(tensors: Mapping[str, Array]) -> tuple[dict[str, Factors], list[str]]:
    """Return the factors by module, and the names of the other tensors."""
    modules: dict[str, Factors] = {}
    others = []
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part in _PARTS and module:
            modules.setdefault(module, {})[part] = tensor
        else:
            others.append(key)
    return modules, others


def _as_peft(module: str, factors: Factors) -> Iterator[tuple[str, Factors]]:
    """Yield the PEFT modules of an MLX module, with their parts by PEFT name."""
    if not {"lora_a", "lora_b"} <= factors.keys():
        raise InvalidAdapterError(
            f"module {module!r} has {', '.join(sorted(factors))}; expected lora_a and lora_b",
            module=module,
        )
    lora_a, lora_b = factors["lora_a"], factors["lora_b"]
    is_embedding = module.rpartition(".")[2] in _EMBEDDINGS
    if lora_b.ndim == 3:
        yield from _experts(module, lora_a, lora_b)
    elif lora_a.ndim != 2 or lora_b.ndim != 2:
        raise InvalidAdapterError(
            f"module {module!r}: lora_a and lora_b have shapes {list(lora_a.shape)} and "
            f"{list(lora_b.shape)}, not matrices",
            module=module,
        )
    elif is_embedding and "m" in factors:
        raise UnsupportedAdapterError(
            f"{module!r} is a DoRA embedding, which MLX scales per token and PEFT per column; "
            "train it without DoRA",
            module=module,
        )
    elif is_embedding:
        yield module, {"embedding_A": lora_a.T, "embedding_B": lora_b.T}
    else:
        magnitude = {"magnitude": factors["m"]} if "m" in factors else {}
        yield module, {"A": lora_a.T, "B": lora_b.T, **magnitude}


def _experts(module: str, lora_a: Array, lora_b: Array) -> Iterator[tuple[str, Factors]]:
    """Yield one adapter per expert of a SwitchLinear."""
    count, _, rank = lora_b.shape
    match = _EXPERTS.fullmatch(module)
    if match is None:
        raise UnsupportedAdapterError(
            f"{module!r} adapts fused experts with no known PEFT names; expected names such as "
            "mlp.switch_mlp.up_proj, or train the adapter without it",
            module=module,
        )
    container, kind, layer = match.groups()
    name = _MIXTRAL.get(layer, layer) if kind == "block_sparse_moe" else layer
    if lora_a.size % (count * rank) or lora_a.shape[-1] * count * rank != lora_a.size:
        raise InvalidAdapterError(
            f"module {module!r}: lora_a {list(lora_a.shape)} does not match lora_b "
            f"{list(lora_b.shape)}; expected (E, r, d_in) and (E, d_out, r)",
            module=module,
        )
    stacked = lora_a.reshape(count, rank, lora_a.shape[-1])
    for expert in range(count):
        yield f"{container}.experts.{expert}.{name}", {"A": stacked[expert], "B": lora_b[expert]}
