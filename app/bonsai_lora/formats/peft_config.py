"""adapter_config.json of PEFT LoRA adapters: every field of peft 0.21's LoraConfig.

Source: peft 0.21.2, src/peft/tuners/lora/config.py and src/peft/tuners/tuners_utils.py. The table
in docs/peft.md is made from FIELDS; `make test-peers` holds FIELDS against the installed peft.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import regex

from bonsai_lora.core.config import LoraConfig, shortest_float32
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError

PATTERN_LENGTH = 512
"""Longest regular expression that is taken from a configuration, in characters."""
PATTERN_SECONDS = 2.0
"""How long all matching for one adapter may take."""

PATTERN_COUNT = 1024
"""Most regular expressions of one configuration."""
EMBEDDING_LAYERS = ("embed_tokens", "lm_head")
DEFAULT_TARGETS = ["q_proj", "v_proj"]
"""What peft adapts in Qwen3 where target_modules is null (its model mapping)."""

# Fuzzy matching and POSIX classes, which are plain text to re.
_NOT_THE_SAME = re.compile(r"\{(?!\d*,?\d*\})|\[:")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Field:
    """What is done with one field of the configuration."""

    policy: Literal["honoured", "ignored", "refused"]
    why: str


FIELDS: Mapping[str, Field] = {
    "task_type": Field("ignored", "says what the model is for, not what the adapter computes"),
    "peft_type": Field("honoured", "must be LORA; other types are refused"),
    "auto_mapping": Field("ignored", "how peft finds the model's class"),
    "peft_version": Field("ignored", "information"),
    "base_model_name_or_path": Field("honoured", "the set's base_model_name"),
    "revision": Field("ignored", "of the base model on a hub"),
    "inference_mode": Field("ignored", "here it is always inference"),
    "r": Field("honoured", "must agree with the tensors, after rank_pattern"),
    "target_modules": Field(
        "honoured", "list, expression or all-linear; tensors of other modules are refused"
    ),
    "exclude_modules": Field("honoured", "tensors of excluded modules are refused"),
    "lora_alpha": Field("honoured", "numerator of the scaling"),
    "lora_dropout": Field("ignored", "training only; kept and exported"),
    "fan_in_fan_out": Field("honoured", "taken as false, as peft does for linear layers"),
    "bias": Field("honoured", "replaced biases go into merged weights"),
    "use_rslora": Field("honoured", "scaling is alpha / sqrt(r)"),
    "modules_to_save": Field("honoured", "replaced weights go into merged weights"),
    "init_lora_weights": Field(
        "honoured",
        "pissa, olora, corda, loftq and lora_ga are refused: they changed the base weights, so A "
        "and B do not fit it unless they were converted",
    ),
    "layers_to_transform": Field("honoured", "tensors of other layers are refused"),
    "layers_pattern": Field("honoured", "finds the layer's number for layers_to_transform"),
    "rank_pattern": Field("honoured", "first matching key wins, as peft matches"),
    "alpha_pattern": Field("honoured", "first matching key wins, as peft matches"),
    "megatron_config": Field("ignored", "how training was spread"),
    "megatron_core": Field("ignored", "how training was spread"),
    "trainable_token_indices": Field("refused", "replaced token rows are not supported"),
    "loftq_config": Field("ignored", "initialisation only; see init_lora_weights"),
    "eva_config": Field("ignored", "initialisation only"),
    "corda_config": Field("ignored", "initialisation only; see init_lora_weights"),
    "lora_ga_config": Field("ignored", "initialisation only; see init_lora_weights"),
    "use_dora": Field("honoured", "applied where the base is registered; merged"),
    "alora_invocation_tokens": Field(
        "refused", "activated LoRA applies to the tokens after an invocation only"
    ),
    "use_qalora": Field("refused", "pooled inputs are defined for GPTQ weights only"),
    "qalora_group_size": Field("ignored", "only meaningful with use_qalora"),
    "layer_replication": Field("refused", "the depth is changed: layers do not fit the base"),
    "runtime_config": Field("ignored", "never saved by peft"),
    "lora_bias": Field("honoured", "s * (B A x + b); merging needs a base that has a bias"),
    "target_parameters": Field("refused", "adapters of 3-D parameters are laid out otherwise"),
    "use_bdlora": Field("refused", "block-diagonal factors are stored in another shape"),
    "arrow_config": Field("refused", "a router over several adapters is not one delta"),
    "ensure_weight_tying": Field("ignored", "changes of tied tensors are not merged in any case"),
    "kasa_config": Field("refused", "KaSA truncates the base weights and adds a diagonal"),
    "velora_config": Field("ignored", "training only: A and B are those of plain LoRA"),
    "monteclora_config": Field("ignored", "training only: A and B are those of plain LoRA"),
}  # fmt: skip
"""Field name -> policy. A refused field is refused only where it is set to a true value."""


@dataclass(frozen=True)
class PeftConfig:
    """An adapter_config.json, checked.

    Raises UnsupportedAdapterError for what would be applied wrongly, InvalidAdapterError for
    values of the wrong kind.
    """

    raw: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check what can be checked without the tensors."""
        _check_supported(self.raw)
        _ = self.lora, self._targets, self._saved_patterns, self._layer_patterns

    @cached_property
    def lora(self) -> LoraConfig:
        """The set's configuration."""
        rank = self.raw.get("r", 8)
        if type(rank) is not int or rank < 1:
            raise InvalidAdapterError(f"r must be a positive integer, got {rank!r}", field="r")
        targets = self.raw.get("target_modules")
        return LoraConfig(
            rank,
            _number(self.raw.get("lora_alpha", 8), "lora_alpha"),
            _dropout(self.raw.get("lora_dropout") or 0.0),
            tuple([targets] if isinstance(targets, str) else sorted(self._listed_targets)),
        )

    @property
    def _listed_targets(self) -> list[str]:
        return _strings(self.raw, "target_modules")

    @property
    def base_model_name(self) -> str:
        """Name of the model that the adapter was trained on; empty where it is not said."""
        return str(self.raw.get("base_model_name_or_path") or "")

    @cached_property
    def modules_to_save(self) -> list[str]:
        """Names of modules that are replaced as a whole."""
        return _strings(self.raw, "modules_to_save")

    def rank_and_scaling(self, module: str) -> tuple[int, float, float]:
        """Return r, alpha and the float32 scaling of a module (LoraLayer.update_layer in peft)."""
        rank = self._ranks.value(module, self.lora.rank)
        alpha = self._alphas.value(module, self.lora.alpha)
        scaling = alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank
        return rank, alpha, shortest_float32(scaling)

    def targets(self, module: str) -> bool:
        """Whether peft would put an adapter on this module (check_target_module_exists)."""
        if self._excluded is not None and self._excluded.found(module):
            return False
        if any(self._clock.match(one, module, "modules_to_save") for one in self._saved_patterns):
            return False
        targets = self.raw.get("target_modules")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return module.rpartition(".")[2] not in EMBEDDING_LAYERS
        if isinstance(targets, str) or module in self._targets.names:
            return self._targets.found(module)
        return self._targets.found(module) and self._is_layer_wanted(module)

    @cached_property
    def _clock(self) -> "_Clock":
        return _Clock()

    @cached_property
    def _ranks(self) -> "_Patterns":
        return _Patterns(self.raw, "rank_pattern", self._clock)

    @cached_property
    def _alphas(self) -> "_Patterns":
        return _Patterns(self.raw, "alpha_pattern", self._clock)

    @cached_property
    def _targets(self) -> "_Names":
        value = self.raw.get("target_modules")
        return _Names(DEFAULT_TARGETS if value is None else value, "target_modules", self._clock)

    @cached_property
    def _excluded(self) -> "_Names | None":
        value = self.raw.get("exclude_modules")
        return _Names(value, "exclude_modules", self._clock) if value else None

    @cached_property
    def _saved_patterns(self) -> list[Any]:
        return [
            self._clock.compile(rf"(^|.*\.){name}($|\..*)", "modules_to_save")
            for name in self.modules_to_save
        ]

    @cached_property
    def _layer_patterns(self) -> list[Any]:
        patterns = self.raw.get("layers_pattern") or []
        if isinstance(patterns, str):
            patterns = [patterns]
        if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
            raise InvalidAdapterError(
                f"layers_pattern must be a string or a list of strings, got {patterns!r}",
                field="layers_pattern",
            )
        texts = [rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\." for one in patterns]
        return [
            self._clock.compile(text, "layers_pattern")
            for text in texts or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        ]

    def _is_layer_wanted(self, module: str) -> bool:
        wanted = self.raw.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        for pattern in self._layer_patterns:
            match = self._clock.match(pattern, module, "layers_pattern")
            if match is not None and match["idx"] is not None:
                index = int(match["idx"])
                return index in wanted if isinstance(wanted, list) else index == wanted
        return False


def decode_config(raw: bytes) -> PeftConfig:
    """Return a checked adapter_config.json; raises InvalidAdapterError, UnsupportedAdapterError."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"adapter_config.json is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidAdapterError("adapter_config.json must be a JSON object")
    return PeftConfig(value)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def unknown_fields(config: PeftConfig) -> list[str]:
    """Return a warning for each field that this version of peft does not have (peft drops them)."""
    unknown = sorted(config.raw.keys() - FIELDS.keys())
    return [f"unknown field {name!r} was passed over, as peft does" for name in unknown]


def _check_supported(raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"peft_type is {kind!r}; only 'LORA' adapters can be served here", got=kind
        )
    for name, field in FIELDS.items():
        # peft asks most of these for `is not None`: an empty object switches them on, too.
        if field.policy == "refused" and raw.get(name) not in (None, False, []):
            raise UnsupportedAdapterError(
                f"{name} is set: {field.why}; such an adapter is not supported", field=name
            )
    if raw.get("lora_bias") and raw.get("use_dora"):
        raise UnsupportedAdapterError(
            "lora_bias and use_dora are both set, which peft does not load: DoRA has no place for "
            "the bias of lora_B",
            field="lora_bias",
        )
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InvalidAdapterError(
            f"bias is {raw['bias']!r}; expected none, all or lora_only", field="bias"
        )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UnsupportedAdapterError(
            f"init_lora_weights is {init!r}, which changed the base weights when training began: "
            "A and B do not fit the original base. Save it again with "
            "path_initial_model_for_weight_conversion",
            field="init_lora_weights",
        )


def _strings(raw: Mapping[str, Any], name: str) -> list[str]:
    value = raw.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InvalidAdapterError(f"{name} must be a list of strings, got {value!r}", field=name)
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(shortest_float32(value)):
        raise InvalidAdapterError(f"{name} must be a finite number, got {value!r}", field=name)
    return float(value)


def _dropout(value: Any) -> float:
    dropout = _number(value, "lora_dropout")
    if not 0.0 <= dropout < 1.0:
        raise InvalidAdapterError(f"lora_dropout must be in [0, 1), got {value!r}")
    return dropout


class _Clock:
    """Regular expressions from strangers, with one time limit for all of them together."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + PATTERN_SECONDS
        self._count = 0

    def compile(self, expression: str, name: str) -> Any:
        if len(expression) > PATTERN_LENGTH:
            raise InvalidAdapterError(
                f"{name} has an expression of {len(expression)} characters; at most "
                f"{PATTERN_LENGTH} are taken",
                field=name,
            )
        if _NOT_THE_SAME.search(expression):
            raise InvalidAdapterError(
                f"{name} has {expression!r}, which means something else to regex than to re",
                field=name,
            )
        self._count += 1
        if self._count > PATTERN_COUNT or time.monotonic() > self._deadline:
            raise InvalidAdapterError(
                f"{name} has too many expressions; at most {PATTERN_COUNT}", field=name
            )
        try:
            re.compile(expression)  # what peft itself would refuse
            return regex.compile(expression)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise InvalidAdapterError(
                f"{name} has {expression!r}, which is no regular expression: {error}", field=name
            ) from None

    def match(self, expression: Any, text: str, name: str, *, full: bool = False) -> Any:
        left = self._deadline - time.monotonic()
        try:
            if left > 0:
                return (expression.fullmatch if full else expression.match)(text, timeout=left)
        except TimeoutError:
            pass
        raise InvalidAdapterError(
            f"the expressions of {name} took over {PATTERN_SECONDS:g} s to match; simplify them",
            field=name,
        )


class _Patterns:
    r"""rank_pattern or alpha_pattern: the first key that matches a module's path wins.

    peft puts each key, as a regular expression, into `(.*\.)?(key)$` (get_pattern_key).
    """

    def __init__(self, raw: Mapping[str, Any], name: str, clock: _Clock) -> None:
        value = raw.get(name) or {}
        if not isinstance(value, dict):
            raise InvalidAdapterError(f"{name} must be an object, got {value!r}", field=name)
        self._name, self._clock = name, clock
        self._items = [
            (clock.compile(rf"(.*\.)?({key})$", name), self._check(one))
            for key, one in value.items()
        ]

    def value(self, module: str, default: Any) -> Any:
        for expression, value in self._items:
            if self._clock.match(expression, module, self._name):
                return value
        return default

    def _check(self, value: Any) -> Any:
        if self._name == "alpha_pattern":
            return _number(value, self._name)
        if type(value) is not int or value < 1:
            raise InvalidAdapterError(
                f"rank_pattern must hold positive integers, got {value!r}", field=self._name
            )
        return value


class _Names:
    """target_modules or exclude_modules: names or last parts, or one expression for the path."""

    def __init__(self, value: Any, name: str, clock: _Clock) -> None:
        self._name, self._clock = name, clock
        self._expression = clock.compile(value, name) if isinstance(value, str) else None
        self.names = frozenset(() if isinstance(value, str) else _strings({name: value}, name))

    def found(self, module: str) -> bool:
        if self._expression is not None:
            return bool(self._clock.match(self._expression, module, self._name, full=True))
        return not self.names.isdisjoint(endings(module))


def endings(module: str) -> list[str]:
    """Return the module's path and everything that follows a dot in it."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
