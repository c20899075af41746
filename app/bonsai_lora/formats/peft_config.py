"""Check adapter_config.json of PEFT LoRA adapters, and evaluate it for each module.

Source: peft 0.21.2, src/peft/tuners/lora/config.py and src/peft/tuners/tuners_utils.py.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bonsai_lora.core.config import LoraConfig, shortest_float32
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.experts import LAYOUT_FIELD
from bonsai_lora.formats.large_json import refuse_constant
from bonsai_lora.formats.names import endings
from bonsai_lora.formats.peft_fields import FIELDS
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.formats.peft_patterns import STEPS_PER_LOOKUP, Choice, Steps, choose
from bonsai_lora.validation import as_written

CONFIG_FILE = "adapter_config.json"
MODEL_FILE = "adapter_model.safetensors"
CONFIG_BYTES = 1 << 20
"""Longest adapter_config.json."""
MAX_ROWS = 1 << 31
"""Limit on the rows of an embedding."""

_MOST_VALUES = 1 << 16
"""Most values of a configuration, as far as commas separate them: other threads wait meanwhile."""
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
"""A literal module name; anything else is an expression."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")


@dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json.

    Raises UnsupportedAdapterError for options that would be applied wrongly, InvalidAdapterError
    for values of the wrong type.
    """

    raw: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check what can be checked without the tensors."""
        _check_supported(self.raw)
        _ = self.lora, self._excluded, self.modules_to_save, self._ranks, self._alphas
        _ = self._layer_names, self._layers, self.options

    @cached_property
    def lora(self) -> LoraConfig:
        """The set's configuration."""
        rank = self.raw.get("r", 8)
        if type(rank) is not int or rank < 1:
            raise InvalidAdapterError(
                f"r is {as_written(rank)}, but r must be a positive integer; send the "
                "adapter_config.json that was saved with the weights",
                field="r",
            )
        targets = self.raw.get("target_modules")
        return LoraConfig(
            rank,
            _number(self.raw.get("lora_alpha", 8), "lora_alpha"),
            _dropout(self.raw.get("lora_dropout")),
            (targets,) if isinstance(targets, str) else tuple(sorted(self._targets)),
        )

    @property
    def base_model_name(self) -> str:
        """Name of the model that the adapter was trained on; empty if unknown."""
        name = self.raw.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    @cached_property
    def modules_to_save(self) -> list[str]:
        """Names of modules whose weights are replaced."""
        return _strings(self.raw, "modules_to_save")

    def is_saved(self, module: str) -> bool:
        """Return whether `module`, or one that contains it, ends with a name in modules_to_save."""
        names = tuple(self.modules_to_save)
        parts = module.split(".")
        self._steps.take(10 * len(parts) * len(names), "modules_to_save")
        return any(".".join(parts[:stop]).endswith(names) for stop in range(1, len(parts) + 1))

    def replaces_bias(self, *, is_adapted: bool) -> bool:
        """Return whether `bias` makes peft save the base's bias of a module."""
        bias = self.raw.get("bias", "none")
        return bias == "all" or (bias == "lora_only" and is_adapted)

    @cached_property
    def options(self) -> BaseOptions:
        """The options that a merge needs."""
        _strings(self.raw, "target_parameters")
        indices = self.raw.get("trainable_token_indices") or []
        for rows in indices.values() if isinstance(indices, dict) else [indices]:
            if not _are_rows(rows):
                expected = "distinct row numbers from 0, as a list or as lists by module"
                raise _invalid("trainable_token_indices", indices, expected)
        return BaseOptions.of(self.raw)

    def scalings(self, modules: Iterable[str]) -> dict[str, "Scaling"]:
        """Return the rank and alpha of each of `modules`, by r, lora_alpha and the patterns."""
        names = list(modules)
        ranks = choose("rank_pattern", self._ranks, names, self.lora.rank, self._steps)
        alphas = choose("alpha_pattern", self._alphas, names, self.lora.alpha, self._steps)
        is_rslora = bool(self.raw.get("use_rslora"))
        return {name: Scaling(ranks[name], alphas[name], is_rslora) for name in names}

    def targets(self, module: str) -> bool:
        """Return whether the lists of names let peft adapt this module.

        Expressions are not evaluated, since the tensors show what they matched (see
        check_target_module_exists in peft 0.21, src/peft/tuners/tuners_utils.py).
        """
        excluded = self.raw.get("exclude_modules")
        if isinstance(excluded, list) and _ends_with_one_of(module, self._excluded):
            return False
        if self._is_inside_saved(module):
            return False
        if not isinstance(self.raw.get("target_modules"), list) or module in self._targets:
            return True
        return _ends_with_one_of(module, self._targets) and self._is_layer_wanted(module)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {key: _positive(one) for key, one in _object(self.raw, "rank_pattern").items()}

    @cached_property
    def _alphas(self) -> dict[str, float]:
        pattern = _object(self.raw, "alpha_pattern")
        return {key: _number(one, "alpha_pattern") for key, one in pattern.items()}

    @cached_property
    def _targets(self) -> frozenset[str]:
        return _names_or_expression(self.raw, "target_modules")

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return _names_or_expression(self.raw, "exclude_modules")

    @cached_property
    def _steps(self) -> Steps:
        return Steps()

    def _is_inside_saved(self, module: str) -> bool:
        """Return whether the module's path contains a literal name of modules_to_save."""
        parts = module.split(".")
        self._steps.take(len(parts) * len(self._saved) * STEPS_PER_LOOKUP, "modules_to_save")
        return any(
            ".".join(parts[start : start + length]) in names
            for length, names in self._saved.items()
            for start in range(len(parts) - length + 1)
        )

    @cached_property
    def _saved(self) -> Mapping[int, set[str]]:
        """The literal names in modules_to_save by number of parts."""
        found: dict[int, set[str]] = {}
        for name in filter(_NAME.fullmatch, self.modules_to_save):
            found.setdefault(name.count(".") + 1, set()).add(name)
        return found

    @cached_property
    def _layer_names(self) -> list[str]:
        """Names that precede a layer number; empty for any."""
        value = self.raw.get("layers_pattern") or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise _invalid("layers_pattern", value, "a string or a list of strings")
        return names

    @cached_property
    def _layers(self) -> frozenset[int]:
        """Numbers of the layers that may have adapters; empty for all."""
        value = self.raw.get("layers_to_transform")
        numbers = [value] if isinstance(value, int) else (value or [])
        if not isinstance(numbers, list) or not all(isinstance(one, int) for one in numbers):
            raise _invalid("layers_to_transform", value, "an integer or a list of them")
        return frozenset(numbers)

    def _is_layer_wanted(self, module: str) -> bool:
        if not self._layers or not all(map(_NAME.fullmatch, self._layer_names)):
            return True
        return _layer_index(module, self._layer_names) in self._layers


@dataclass(frozen=True, slots=True)
class Scaling:
    """The configured rank and alpha of one module."""

    rank: Choice[int]
    alpha: Choice[float]
    is_rslora: bool

    def of(self, module: str, rank: int) -> tuple[float, float]:
        """Return alpha and the float32 scaling of a module whose tensors have `rank`.

        As LoraLayer.update_layer in peft. Raises InvalidAdapterError if the configured rank is
        different, UnsupportedAdapterError if alpha depends on a key that RE2 cannot express.
        """
        if rank not in self.rank.values():
            raise InvalidAdapterError(
                f"module {module!r} has tensors of rank {rank}, but the configured rank is "
                f"{self.rank.value}; correct r or rank_pattern",
                module=module,
                got=rank,
                expected=self.rank.value,
            )
        if self.alpha.uncertain:
            raise UnsupportedAdapterError(
                f"the alpha_pattern key {self.alpha.keys[0][:200]!r} cannot be matched against "
                f"module {module!r}, because it has a lookaround, a back-reference or another "
                "construct without a linear-time match; list the module names instead",
                field="alpha_pattern",
                module=module,
            )
        alpha = self.alpha.value
        scaling = alpha / math.sqrt(rank) if self.is_rslora else alpha / rank
        return alpha, shortest_float32(scaling)


def parse_config(raw: bytes) -> dict[str, Any]:
    """Return the fields of an adapter_config.json; raises InvalidAdapterError unless it is JSON."""
    if raw.count(b",") > _MOST_VALUES:
        raise InvalidAdapterError(
            f"adapter_config.json has {raw.count(b',')} commas, but the limit is {_MOST_VALUES}; "
            "send the file that was saved with the weights"
        )
    try:
        value = json.loads(raw, parse_constant=refuse_constant)
        if b"\\u" in raw:  # half a surrogate pair cannot be written
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InvalidAdapterError(
            "adapter_config.json is nested too deeply to be read; send the file that was saved "
            "with the weights"
        ) from None
    except ValueError as error:
        fault = "it is binary" if isinstance(error, UnicodeDecodeError) else error
        raise InvalidAdapterError(
            f"adapter_config.json is not JSON: {fault}; send the file that "
            "was saved with the weights"
        ) from None
    if not isinstance(value, dict):
        raise InvalidAdapterError(
            f"adapter_config.json is {as_written(value)}; expected an object with PEFT's fields"
        )
    return value


def unknown_fields(config: PeftConfig) -> list[str]:
    """Return a warning for each field that peft does not know; peft drops them."""
    unknown = sorted(config.raw.keys() - FIELDS.keys() - {LAYOUT_FIELD})
    return [f"unknown field {name!r} was ignored, as by peft" for name in unknown]


def _check_supported(raw: Mapping[str, Any]) -> None:
    if "peft_type" not in raw:
        raise UnsupportedAdapterError(
            "adapter_config.json has neither the peft_type of a PEFT adapter nor the "
            "lora_parameters of an MLX one; send the file that was saved with the weights"
        )
    kind = raw["peft_type"]
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"peft_type is {as_written(kind)}; expected LORA, the type that LoraConfig trains",
            got=str(kind)[:100],
        )
    for name, field in FIELDS.items():
        # peft tests most of these with `is not None`, so an empty object enables them too.
        if field.policy == "refused" and raw.get(name) not in (None, False, []):
            raise UnsupportedAdapterError(
                f"{name} is set, which is not supported: {field.why}; train the adapter without it",
                field=name,
            )
    if raw.get("lora_bias") and raw.get("use_dora"):
        raise UnsupportedAdapterError(
            "lora_bias and use_dora are both set, which peft does not support; disable one of them",
            field="lora_bias",
        )
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _invalid("bias", raw["bias"], "none, all or lora_only")
    for name in _FLAGS:
        if raw.get(name) not in (None, False, True):
            raise _invalid(name, raw[name], "true or false")
    _check_start(raw.get("init_lora_weights"))


def _check_start(init: Any) -> None:
    """Raise UnsupportedAdapterError if the start values of A and B changed the base weights."""
    if not isinstance(init, str) or init.lower() in _KEEPS_BASE:
        return
    if init.lower().startswith(_CHANGES_BASE):
        raise UnsupportedAdapterError(
            f"init_lora_weights is {init!r}, which changes the base weights before training, so "
            "A and B do not fit the original base; save the adapter again with "
            "path_initial_model_for_weight_conversion",
            field="init_lora_weights",
        )
    raise UnsupportedAdapterError(
        f"init_lora_weights is {init[:100]!r}, which peft 0.21 does not know, so the base weights "
        "may have been changed before training; set it to true if they were not",
        field="init_lora_weights",
    )


def _invalid(field: str, value: Any, expected: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"{field} is {as_written(value)}; expected {expected}", field=field)


def _strings(raw: Mapping[str, Any], name: str) -> list[str]:
    value = raw.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _invalid(name, value, "a list of strings")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(shortest_float32(value)):
        raise _invalid(name, value, "a finite number")
    return float(value)


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise InvalidAdapterError(
            f"rank_pattern has the value {as_written(value)}; expected positive integers",
            field="rank_pattern",
        )
    return value


def _object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise _invalid(name, value, "an object of names and numbers")
    return value


def _are_rows(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(type(one) is int and 0 <= one < MAX_ROWS for one in value)
        and len(set(value)) == len(value)
    )


def _dropout(value: Any) -> float:
    """Return a valid dropout; 0 for invalid values, since inference ignores it."""
    is_fraction = type(value) in (int, float) and 0.0 <= shortest_float32(value) < 1.0
    return float(value) if is_fraction else 0.0


def _names_or_expression(raw: Mapping[str, Any], name: str) -> frozenset[str]:
    """Return the names in a list; no names if the field is an expression or null."""
    return frozenset() if isinstance(raw.get(name), str) else frozenset(_strings(raw, name))


def _ends_with_one_of(module: str, names: frozenset[str]) -> bool:
    return not names.isdisjoint(endings(module))


def _layer_index(module: str, names: list[str]) -> int | None:
    """Return the layer number of the module as peft does: the first that follows one of `names`.

    Without names it is the first number that follows at least two other parts.
    """
    parts = module.split(".")
    for place in range(1, len(parts) - 1):
        behind = parts[place - 1] in names if names else place > 1
        if behind and parts[place].isdecimal():
            return int(parts[place])
    return None
