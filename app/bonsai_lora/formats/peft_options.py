"""Options in adapter_config.json that concern the base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bonsai_lora.formats.experts import targeted_parameters
from bonsai_lora.formats.names import endings

_EXPERTS = "experts"
"""How nearly all classes of transformers 5 name the module that stacks its experts."""


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """The fields of a checked configuration that a merge needs."""

    is_transposed: bool = False
    """fan_in_fan_out: the base may store weights as (in, out), like Conv1D."""
    saved: tuple[str, ...] = ()
    """modules_to_save: name suffixes of modules whose weights are replaced."""
    token_indices: Mapping[str, Sequence[int]] | Sequence[int] = ()
    """trainable_token_indices: row numbers, by module or for all embeddings."""
    target_parameters: tuple[str, ...] = ()
    """Name suffixes of the 3-D parameters that fused experts adapt."""
    target_modules: frozenset[str] | None = frozenset()
    """Name suffixes of the layers that are adapted as a whole; None for an expression."""

    @classmethod
    def of(cls, raw: Mapping[str, Any] | None) -> "BaseOptions":
        """Return the options of a configuration; None means plain LoRA."""
        if raw is None:
            return PLAIN
        targets = raw.get("target_modules") or ()
        return cls(
            bool(raw.get("fan_in_fan_out")),
            tuple(raw.get("modules_to_save") or ()),
            raw.get("trainable_token_indices") or (),
            tuple(raw.get("target_parameters") or ()),
            None if isinstance(targets, str) else frozenset(targets),
        )

    def is_saved(self, module: str) -> bool:
        """Return whether modules_to_save names `module`."""
        return module.endswith(self.saved)

    def parameters_of(self, modules: Iterable[str]) -> Mapping[str, str]:
        """Return the parameter that each module of fused experts adapts."""
        return targeted_parameters(self.target_parameters, modules, self._is_linear)

    def _is_linear(self, module: str) -> bool:
        """Return whether `module` is adapted as a whole, not a parameter of it."""
        if self.target_modules is None:
            return _EXPERTS not in module.split(".")
        return not self.target_modules.isdisjoint(endings(module))

    def rows_of(self, module: str) -> Sequence[int]:
        """Return the numbers of the replaced rows of `module`."""
        if not isinstance(self.token_indices, Mapping):
            return self.token_indices
        for name, rows in self.token_indices.items():
            if module.endswith(name):
                return rows
        return ()


PLAIN = BaseOptions()
"""The options of plain LoRA."""
