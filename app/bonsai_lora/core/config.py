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
    """What an adapter is made from; the defaults are the reference's.

    Raises InvalidRequestError for a negative rank, a non-finite alpha (as float32), or a
    dropout outside [0, 1).
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
        if self.rank < 0:
            raise InvalidRequestError(f"rank must be 0 or more, got {self.rank}", rank=self.rank)
        object.__setattr__(self, "alpha", shortest_float32(self.alpha))
        object.__setattr__(self, "dropout", shortest_float32(self.dropout))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not np.isfinite(self.alpha):
            raise InvalidRequestError(f"alpha must be a finite float32, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidRequestError(f"dropout must be in [0, 1), got {self.dropout}")

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
