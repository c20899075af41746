"""PEFT LoRA adapters: adapter_config.json and tensor names (peft 0.21, src/peft/tuners/lora)."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import regex

from app.core.adapter import LoraAdapter
from app.core.cast import Array, all_finite
from app.core.config import LoraConfig, shortest_float32
from app.core.registry import LoraRegistry
from app.errors import InvalidAdapterError, UnsupportedAdapterError
from app.formats.names import check_module_name

_PREFIX = "base_model.model."
_KEY = regex.compile(
    r"(?:base_model\.(?:model\.)?)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight"
)
_PATTERN_LENGTH = 512
_PATTERN_SECONDS = 2.0

_REFUSED_WHEN_SET = {
    "use_dora": "DoRA needs the norms of the base weights",
    "modules_to_save": "whole replaced modules cannot be applied as a delta",
    "trainable_token_indices": "replaced token rows cannot be applied as a delta",
    "target_parameters": "adapters of 3-D expert parameters are laid out differently",
    "layer_replication": "the model's depth is changed, so layers do not fit the base",
    "use_bdlora": "block-diagonal factors are stored in another shape",
    "use_qalora": "pooled inputs are defined for GPTQ weights only",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only",
    "arrow_config": "a router over several adapters is not one delta",
    "kasa_config": "KaSA changes the base weights and adds a diagonal",
    "lora_bias": "a bias beside B is not part of the delta's two matrices",
    "fan_in_fan_out": "the base weights would be stored transposed; no Qwen3 module is",
}
"""Field -> why a true value is refused."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What an upload holds, checked: the adapters and what was passed over on purpose."""

    registry: LoraRegistry
    base_model_name: str
    ignored_keys: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def tensor_keys(module: str) -> tuple[str, str]:
    """Return the names of A and B of `module` in a PEFT file."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def decode_config(raw: bytes) -> dict[str, Any]:
    """Return the object in an adapter_config.json; raises InvalidAdapterError."""
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"adapter_config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidAdapterError("adapter_config.json must be a JSON object")
    return config


def decode_adapter(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> PeftAdapter:
    """Return the adapters that PEFT would make of `config` and `tensors` (views are kept).

    Raises UnsupportedAdapterError for a kind that would be applied wrongly, InvalidAdapterError
    where configuration and tensors contradict each other; both list what is wrong.
    """
    _check_supported(config)
    base_config = _decode_hyper_parameters(config)
    pairs = _pair_tensors(tensors)
    ranks = _Patterns(config, "rank_pattern")
    alphas = _Patterns(config, "alpha_pattern")
    adapters = {}
    for module, (a_matrix, b_matrix) in pairs.items():
        rank = ranks.value(module, base_config.rank)
        alpha = alphas.value(module, base_config.alpha)
        _check_pair(module, a_matrix, b_matrix, rank)
        own = LoraConfig(rank, alpha, base_config.dropout, base_config.target_modules)
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        adapters[module] = LoraAdapter(own, a_matrix, b_matrix, float(np.float32(scaling)))
    return PeftAdapter(
        LoraRegistry(base_config).add_all(adapters),
        str(config.get("base_model_name_or_path") or ""),
        warnings=_unknown_fields(config),
    )


def encode_config(
    registry: LoraRegistry, base_model_name: str, original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the adapter_config.json of a set: the uploaded one, or one that says the same.

    Scalings that are not alpha / r (rsLoRA) are written as the alpha that gives them.
    """
    if original is not None:
        return dict(original)
    config = registry.config
    adapters = registry.adapters
    alphas = {name: _exported_alpha(one) for name, one in adapters.items()}
    modules = sorted({name.rpartition(".")[2] for name in adapters}) or list(config.target_modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name or None,
        "inference_mode": True,
        "r": max(config.rank, 1),
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": modules,
        "rank_pattern": {name: a.rank for name, a in adapters.items() if a.rank != config.rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != config.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _exported_alpha(adapter: LoraAdapter) -> float:
    if adapter.scaling == adapter.config.scaling:
        return adapter.config.alpha
    return adapter.scaling * adapter.rank


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"peft_type is {kind!r}; only 'LORA' adapters can be served here", got=kind
        )
    for name, reason in _REFUSED_WHEN_SET.items():
        if config.get(name):
            raise UnsupportedAdapterError(
                f"{name} is set, and {reason}; it is not supported", field=name
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"bias is {config['bias']!r}: replaced biases are no delta; only 'none' is supported",
            field="bias",
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UnsupportedAdapterError(
            f"init_lora_weights is {init!r}, which changed the base weights when training began; "
            "A and B do not fit the original base. Save it again with "
            "path_initial_model_for_weight_conversion",
            field="init_lora_weights",
        )


def _decode_hyper_parameters(config: Mapping[str, Any]) -> LoraConfig:
    rank = config.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise InvalidAdapterError(f"r must be a positive integer, got {rank!r}", field="r")
    targets = config.get("target_modules")
    listed = [targets] if isinstance(targets, str) else targets or []
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise InvalidAdapterError("target_modules must be a string or a list of strings")
    return LoraConfig(
        rank,
        _number(config.get("lora_alpha", 8), "lora_alpha"),
        _number(config.get("lora_dropout", 0.0) or 0.0, "lora_dropout"),
        tuple(sorted(listed)),
    )


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(shortest_float32(value)):
        raise InvalidAdapterError(f"{name} must be a finite number, got {value!r}", field=name)
    return float(value)


def _pair_tensors(tensors: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Return A and B by module; raises for keys that are no LoRA weights and for lone halves."""
    halves: dict[str, dict[str, Array]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        module = check_module_name(match["module"])
        if match["half"] in halves.setdefault(module, {}):
            raise InvalidAdapterError(
                f"there are two tensors for lora_{match['half']} of {module!r}", module=module
            )
        halves[module][match["half"]] = tensor
    if unknown:
        raise UnsupportedAdapterError(
            f"{len(unknown)} tensors are no LoRA weights and would be lost: "
            + ", ".join(unknown[:8]),
            keys=unknown[:64],
        )
    lone = [module for module, found in halves.items() if len(found) != 2]
    if lone:
        raise InvalidAdapterError(
            f"{len(lone)} modules have only one of lora_A and lora_B: " + ", ".join(lone[:8]),
            modules=lone[:64],
        )
    if not halves:
        raise InvalidAdapterError("the adapter has no LoRA tensors: it would change nothing")
    return {module: (found["A"], found["B"]) for module, found in halves.items()}


def _check_pair(module: str, a_matrix: Array, b_matrix: Array, rank: int) -> None:
    for half, matrix in (("A", a_matrix), ("B", b_matrix)):
        if matrix.ndim != 2:
            raise InvalidAdapterError(
                f"lora_{half} of {module!r} has shape {list(matrix.shape)}, not two dimensions",
                module=module,
                got=list(matrix.shape),
            )
        if matrix.dtype.itemsize == 8:
            raise UnsupportedAdapterError(
                f"lora_{half} of {module!r} is F64; expected F32, F16 or BF16", module=module
            )
        if not all_finite(matrix):
            raise InvalidAdapterError(
                f"lora_{half} of {module!r} holds NaN or infinity", module=module
            )
    if a_matrix.shape[0] != b_matrix.shape[1] or a_matrix.shape[0] != rank:
        raise InvalidAdapterError(
            f"module {module!r}: lora_A {list(a_matrix.shape)} and lora_B {list(b_matrix.shape)} "
            f"have rank {a_matrix.shape[0]} and {b_matrix.shape[1]}, but the configuration "
            f"says {rank}",
            module=module,
            got=[a_matrix.shape[0], b_matrix.shape[1]],
            expected=rank,
        )


class _Patterns:
    r"""rank_pattern or alpha_pattern: the first key that matches a module's path wins.

    PEFT puts each key, as a regular expression, into `(.*\.)?(key)$`. All matching of one
    pattern together may take two seconds, so that no expression can run for ever.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        value = config.get(name) or {}
        if not isinstance(value, dict):
            raise InvalidAdapterError(f"{name} must be an object, got {value!r}", field=name)
        self._name = name
        self._deadline = time.monotonic() + _PATTERN_SECONDS
        self._items = [(self._compile(key), self._check(one)) for key, one in value.items()]

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first key that matches, else `default`."""
        for expression, value in self._items:
            left = self._deadline - time.monotonic()
            try:
                if left > 0 and expression.match(module, timeout=left):
                    return value
            except TimeoutError:
                left = 0
            if left <= 0:
                raise InvalidAdapterError(
                    f"{self._name} took over {_PATTERN_SECONDS:g} s to match; simplify its keys",
                    field=self._name,
                )
        return default

    def _compile(self, key: str) -> Any:
        if len(key) > _PATTERN_LENGTH:
            raise InvalidAdapterError(
                f"{self._name} has a key of {len(key)} characters; at most {_PATTERN_LENGTH}",
                field=self._name,
            )
        try:
            return regex.compile(rf"(.*\.)?({key})$")
        except regex.error as error:
            raise InvalidAdapterError(
                f"{self._name} has the key {key!r}, no regular expression: {error}",
                field=self._name,
            ) from None

    def _check(self, value: Any) -> Any:
        if self._name == "alpha_pattern":
            return _number(value, self._name)
        if type(value) is not int or value < 1:
            raise InvalidAdapterError(
                f"rank_pattern must hold positive integers, got {value!r}", field=self._name
            )
        return value


_KNOWN_FIELDS = frozenset(_REFUSED_WHEN_SET) | {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip


def _unknown_fields(config: Mapping[str, Any]) -> list[str]:
    unknown = sorted(config.keys() - _KNOWN_FIELDS)
    return [f"unknown field {name!r} was passed over" for name in unknown]
