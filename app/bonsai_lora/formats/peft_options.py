"""Options in adapter_config.json that concern the base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bonsai_lora.formats.experts import targeted_parameters


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

    @classmethod
    def of(cls, raw: Mapping[str, Any] | None) -> "BaseOptions":
        """Return the options of a configuration; None means plain LoRA."""
        if raw is None:
            return PLAIN
        return cls(
            raw.get("fan_in_fan_out") is True,
            tuple(raw.get("modules_to_save") or ()),
            raw.get("trainable_token_indices") or (),
            tuple(raw.get("target_parameters") or ()),
        )

    def is_saved(self, module: str) -> bool:
        """Return whether modules_to_save names `module`."""
        return module.endswith(self.saved)

    def parameters_of(self, modules: Iterable[str]) -> Mapping[str, str]:
        """Return the parameter that each module of fused experts adapts."""
        return targeted_parameters(self.target_parameters, modules)

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
