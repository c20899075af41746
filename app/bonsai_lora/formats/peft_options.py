"""What an adapter_config.json says of the base that the adapter is merged into."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bonsai_lora.formats.experts import targeted_parameters


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """Fields of a configuration that `PeftConfig` has checked, as a merge needs them."""

    is_transposed: bool = False
    """fan_in_fan_out: the base may store its weights (in, out), as Conv1D does."""
    saved: tuple[str, ...] = ()
    """modules_to_save: names at the end of modules that have weights of their own."""
    token_indices: Mapping[str, Sequence[int]] | Sequence[int] = ()
    """trainable_token_indices: numbers of the rows, by module or for every embedding."""
    target_parameters: tuple[str, ...] = ()
    """Names at the end of 3-D parameters that fused experts are for."""

    @classmethod
    def of(cls, raw: Mapping[str, Any] | None) -> "BaseOptions":
        """Return the options of a configuration, those of plain LoRA where there is none."""
        if raw is None:
            return PLAIN
        return cls(
            raw.get("fan_in_fan_out") is True,
            tuple(raw.get("modules_to_save") or ()),
            raw.get("trainable_token_indices") or (),
            tuple(raw.get("target_parameters") or ()),
        )

    def is_saved(self, module: str) -> bool:
        """Whether modules_to_save names `module`."""
        return module.endswith(self.saved)

    def parameters_of(self, modules: Iterable[str]) -> Mapping[str, str]:
        """Return the parameter that each module of fused experts is for."""
        return targeted_parameters(self.target_parameters, modules)

    def rows_of(self, module: str) -> Sequence[int]:
        """Return the numbers of the rows that `module` replaces."""
        if not isinstance(self.token_indices, Mapping):
            return self.token_indices
        for name, rows in self.token_indices.items():
            if module.endswith(name):
                return rows
        return ()


PLAIN = BaseOptions()
"""The options of plain LoRA."""
