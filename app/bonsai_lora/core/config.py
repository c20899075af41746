"""Hyper-parameters of a LoRA adapter (Hu et al. 2021, section 4.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bonsai_lora.errors import InvalidRequestError

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


def shortest_float32(value: float) -> float:
    """Return the double that prints as the shortest decimal of `value` rounded to float32.

    Infinite beyond float32.
    """
    try:
        with np.errstate(over="ignore"):
            return float(str(np.float32(value)))
    except OverflowError:  # an integer beyond float64
        return float("inf")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The hyper-parameters of an adapter; the defaults are the reference's.

    Raises InvalidRequestError for a negative rank, an alpha that is not finite in float32, a
    dropout outside [0, 1), or one string as target_modules.
    """

    rank: int = 8
    """r, the number of rows of A and columns of B; 0 makes an adapter that changes nothing."""
    alpha: float = 8.0
    """Numerator of the scaling alpha / r; kept as a float32 value."""
    dropout: float = 0.0
    """Probability in [0, 1) used in training; inference ignores it."""
    target_modules: tuple[str, ...] = ATTENTION_MODULES + MLP_MODULES
    """Modules to adapt, by full name or last part; empty means all."""

    def __post_init__(self) -> None:
        """Check the ranges and round alpha and dropout to float32."""
        alpha, dropout = shortest_float32(self.alpha), shortest_float32(self.dropout)
        if self.rank < 0:
            raise _invalid("rank", self.rank, "0 or more")
        if not np.isfinite(alpha):
            raise _invalid("alpha", self.alpha, "a number that is finite in float32")
        if not 0.0 <= dropout < 1.0:
            raise _invalid("dropout", self.dropout, "a number from 0 to less than 1")
        if isinstance(self.target_modules, str):  # a sequence too, of its letters
            raise _invalid("target_modules", self.target_modules, "a sequence of names")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "dropout", dropout)
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        """`alpha / rank` in float32; 0.0 for rank 0."""
        if self.rank == 0:
            return 0.0
        return float(np.float32(self.alpha) / np.float32(self.rank))

    def targets(self, module: str) -> bool:
        """Whether `target_modules` keeps `module` (by full name or as its last parts)."""
        return not self.target_modules or any(
            module == key or module.endswith("." + key) for key in self.target_modules
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of this configuration."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "target_modules": list(self.target_modules),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "LoraConfig":
        """Return the configuration that `to_dict` wrote."""
        return cls(value["rank"], value["alpha"], value["dropout"], tuple(value["target_modules"]))


def _invalid(field: str, value: object, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} is {value!r}; expected {expected}", field=field)
