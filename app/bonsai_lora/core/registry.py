"""The adapters of a model by module name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats
from bonsai_lora.core.config import LoraConfig


@dataclass(frozen=True, eq=False)
class LoraRegistry:
    """Adapters by module name, in insertion order; adding or removing makes a new registry."""

    config: LoraConfig
    adapters: Mapping[str, LoraAdapter] = field(default_factory=lambda: MappingProxyType({}))

    def add(self, module_name: str, adapter: LoraAdapter) -> "LoraRegistry":
        """Return a registry that also holds `adapter`; an adapter of that name is replaced."""
        return self.add_all({module_name: adapter})

    def add_all(self, adapters: Mapping[str, LoraAdapter]) -> "LoraRegistry":
        """Return a registry that also holds all of `adapters`."""
        return LoraRegistry(self.config, MappingProxyType({**self.adapters, **adapters}))

    def remove(self, module_name: str) -> "LoraRegistry":
        """Return a registry without that module, which need not be in it."""
        rest = {name: one for name, one in self.adapters.items() if name != module_name}
        return LoraRegistry(self.config, MappingProxyType(rest))

    def get(self, module_name: str) -> LoraAdapter | None:
        """Return the adapter of that module, or None."""
        return self.adapters.get(module_name)

    def apply_adapter(self, module_name: str, x: Floats) -> Floats | None:
        """Return what that module's adapter adds for `x`, or None without an adapter."""
        adapter = self.adapters.get(module_name)
        return None if adapter is None else adapter.apply(x)

    def adapter_count(self) -> int:
        """Return the number of adapters."""
        return len(self.adapters)

    def total_param_count(self) -> int:
        """Return the sum of all param_count."""
        return sum(adapter.param_count() for adapter in self.adapters.values())

    def total_memory_bytes(self) -> int:
        """Return the sum of all memory_bytes."""
        return sum(adapter.memory_bytes() for adapter in self.adapters.values())

    def is_empty(self) -> bool:
        """Return whether there is no adapter."""
        return not self.adapters

    def module_names(self) -> tuple[str, ...]:
        """Return the module names in insertion order."""
        return tuple(self.adapters)

    @staticmethod
    def estimate_adapters_for_budget(d_in: int, d_out: int, rank: int, budget_bytes: int) -> int:
        """Return how many adapters of these dimensions fit into `budget_bytes`.

        0 if not even one fits, or if an adapter has no parameters.
        """
        bytes_per_adapter = adapter_bytes(d_in, d_out, rank)
        return budget_bytes // bytes_per_adapter if bytes_per_adapter else 0


def adapter_bytes(d_in: int, d_out: int, rank: int) -> int:
    """Return the float32 size in bytes of an adapter of these dimensions."""
    return 4 * rank * (d_in + d_out)
