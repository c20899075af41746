"""How sets are combined: the methods, and which options each takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bonsai_lora.errors import InvalidRequestError

Method = Literal[
    "exact",
    "cat",
    "svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
    "slerp",
    "breadcrumbs",
    "della",
    "knots_ties",
    "tsv",
    "iso_c",
]
Sign = Literal["total", "frequency"]
"""How the majority sign is elected: by the sum of the entries, or by their number."""

_ON_FACTORS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "ties": ("density", "sign"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "sign", "seed"),
    "magnitude_prune": ("density",),
}
"""PEFT's types that treat A and B as if they were weights of their own."""
_ON_DELTAS: Mapping[str, tuple[str, ...]] = {
    "ties_svd": ("rank", "density", "sign"),
    "dare_linear_svd": ("rank", "density", "seed"),
    "dare_ties_svd": ("rank", "density", "sign", "seed"),
    "magnitude_prune_svd": ("rank", "density"),
    "breadcrumbs": ("rank", "density", "gamma"),
    "della": ("rank", "density", "epsilon", "seed"),
}
"""Methods on each entry of the deltas, whose result is cut to a rank."""
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "exact": (),
    "cat": (),
    "svd": ("rank", "energy"),
    "slerp": ("rank", "energy"),
    "knots_ties": ("rank", "energy", "density"),
    "tsv": ("rank",),
    "iso_c": ("rank", "energy"),
    **_ON_FACTORS,
    **_ON_DELTAS,
}
"""The options that each method takes."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method with its options; raises InvalidRequestError for one that it does not take."""

    method: Method
    rank: int | None = None
    """Highest rank of the result's modules."""
    energy: float | None = None
    """Share in (0, 1] of the sum of squared singular values that each module keeps."""
    density: float | None = None
    """Share in (0, 1] of the entries that are kept."""
    sign: Sign | None = None
    gamma: float | None = None
    """Share in [0, 1) of the largest entries that are dropped; breadcrumbs' default is 0.01."""
    epsilon: float | None = None
    """Half the range of probabilities; della's default is 0.15."""
    seed: int | None = None
    """Seed of the draws; the default is 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        taken = OPTIONS[self.method]
        for name in ("rank", "energy", "density", "sign", "gamma", "epsilon", "seed"):
            value = getattr(self, name)
            if value is not None and name not in taken:
                known = ", ".join(taken) or "no options"
                raise _invalid(name, f"is {value!r}, but {self.method} takes {known}; remove it")
        if self.rank is not None and self.energy is not None:
            raise _invalid("energy", f"is {self.energy!r} beside a rank; send one of them")
        if self.rank is not None and self.rank < 1:
            raise _invalid("rank", f"is {self.rank!r}; expected 1 or more")
        for name in ("energy", "density"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise _invalid(name, f"is {value!r}; expected a number over 0, up to 1")
        if not 0 <= self.outliers < 1:
            raise _invalid("gamma", f"is {self.gamma!r}; expected a number from 0 to less than 1")
        if "density" in taken and self.method != "knots_ties" and self.density is None:
            raise _invalid("density", f"is missing, which {self.method} needs; send 0.5, say")
        if self.method == "della":
            self._check_range()

    def _check_range(self) -> None:
        low, high = self.kept - self.half_range, self.kept + self.half_range
        if self.half_range < 0 or low <= 0 or high >= 1:
            raise _invalid(
                "epsilon",
                f"is {self.half_range:g}, so entries are kept with probabilities from {low:g} to "
                f"{high:g}; expected both between 0 and 1",
            )

    @property
    def is_on_factors(self) -> bool:
        """Whether A and B are combined separately, which needs equal ranks."""
        return self.method in _ON_FACTORS

    @property
    def is_on_deltas(self) -> bool:
        """Whether each entry of the deltas is computed."""
        return self.method in _ON_DELTAS

    @property
    def kept(self) -> float:
        """The density; 1 if it is not given."""
        return 1.0 if self.density is None else self.density

    @property
    def half_range(self) -> float:
        """The epsilon, or its default."""
        return 0.15 if self.epsilon is None else self.epsilon

    @property
    def outliers(self) -> float:
        """The gamma, or its default."""
        return 0.01 if self.gamma is None else self.gamma


def _invalid(field: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {text}", field=field)
