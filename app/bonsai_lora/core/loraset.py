"""A complete set of adapters for one Bonsai or Qwen3 model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.core.shapes import AttentionShape, MlpShape, Shapes, layered


@dataclass(frozen=True, eq=False)
class BonsaiLoraSet:
    """A registry of adapters with the model it is for and its own name; immutable."""

    registry: LoraRegistry
    base_model_name: str
    adapter_name: str
    replacements: Mapping[str, Array] = field(default_factory=lambda: MappingProxyType({}))
    """Parameters of the base that are replaced as a whole (modules_to_save, biases), by name."""

    @classmethod
    def new(cls, config: LoraConfig, model_name: str, adapter_name: str) -> "BonsaiLoraSet":
        """Return an empty set."""
        return cls(LoraRegistry(config), model_name, adapter_name)

    def add_attention_adapters(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_layers: int | None = None,
    ) -> "BonsaiLoraSet":
        """Return the set with new q_proj, k_proj, v_proj and o_proj adapters.

        The two positional arguments follow the reference exactly; num_kv_heads or head_dim give
        the true Qwen3 shapes; num_layers gives one of each per layer, under full names.
        """
        shape = AttentionShape(hidden_size, num_heads, num_kv_heads, head_dim)
        return self._add_each(shape.modules(), num_layers)

    def add_mlp_adapters(
        self, hidden_size: int, intermediate_size: int, *, num_layers: int | None = None
    ) -> "BonsaiLoraSet":
        """Return the set with new gate_proj, up_proj and down_proj adapters."""
        return self._add_each(MlpShape(hidden_size, intermediate_size).modules(), num_layers)

    def _add_each(self, shapes: Shapes, num_layers: int | None) -> "BonsaiLoraSet":
        return self.add_adapters(shapes if num_layers is None else layered(shapes, num_layers))

    def add_adapters(self, shapes: Shapes) -> "BonsaiLoraSet":
        """Return the set with a new adapter for each (d_in, d_out) of `shapes`."""
        config = self.registry.config
        return self.with_registry(
            self.registry.add_all(
                {name: LoraAdapter.new(*shape, config) for name, shape in shapes.items()}
            )
        )

    def with_registry(self, registry: LoraRegistry) -> "BonsaiLoraSet":
        """Return the set with `registry` in place of its own."""
        return replace(self, registry=registry)

    def total_trainable_params(self) -> int:
        """Return the parameter count of all adapters and replaced parameters."""
        return self.registry.total_param_count() + sum(
            one.size for one in self.replacements.values()
        )

    def total_memory_bytes(self) -> int:
        """Return the size of all parameters as float32, in bytes."""
        return 4 * self.total_trainable_params()

    def efficiency_ratio(self, base_param_count: int) -> float:
        """Return LoRA parameters over base parameters; 0.0 if the count is 0."""
        return self.total_trainable_params() / base_param_count if base_param_count else 0.0
