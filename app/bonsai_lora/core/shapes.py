"""Which modules a Qwen3 or Bonsai model has, and how wide they are.

Sizes: the models' config.json (Qwen3 technical report, 2025, table 1). Note that heads * head_dim
differs from hidden_size for 0.6B, 4B and 32B, so q_proj is not square there.

Bonsai models have the architecture of the model that they were made from:

- Bonsai 1.7B, 4B and 8B: the Qwen3 model of their size (1-bit Bonsai 8B whitepaper; the keys of
  Bonsai-8B-Q1_0.gguf are those of Qwen3-8B).
- Bonsai 27B: Qwen3.6-27B, and Bonsai 2 27B: Qwen3.8-27B (PrismML, Bonsai-demo, README.md), with the
  shape of Qwen3.5-27B (THUDM/slime, scripts/models/qwen3.5-27B.sh). Its files agree: 402
  matrices are ternary, and prism.hadamard.sign_widths are 5120, 6144 and 17408.
- Bonsai 2 4B and 9B: Qwen3.5 of that size, unchanged (Ternary Bonsai 2 2B / 4B / 9B whitepaper,
  PrismML, October 2026), whose text_config in config.json has the numbers below.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bonsai_lora.core.config import ATTENTION_MODULES, MLP_MODULES
from bonsai_lora.errors import InvalidRequestError

Shapes = Mapping[str, tuple[int, int]]
"""Module name -> (d_in, d_out)."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Widths of the attention projections."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    """Key/value heads; None with head_dim None follows the reference."""
    head_dim: int | None = None
    """Width of a head; None is hidden_size // num_heads."""

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of q, k, v and o.

        With neither num_kv_heads nor head_dim, the reference's rule: q and o are square, k and v
        have hidden_size // num_heads * num_heads outputs (0 heads: 0 outputs).
        """
        hidden, heads = self.hidden_size, self.num_heads
        if self.num_kv_heads is None and self.head_dim is None:
            head_dim = hidden // heads if heads else hidden
            q_dim, kv_dim = hidden, head_dim * heads
        else:
            head_dim = self.head_dim if self.head_dim is not None else self._divided_head_dim()
            q_dim = heads * head_dim
            kv_dim = (heads if self.num_kv_heads is None else self.num_kv_heads) * head_dim
        return {
            "q_proj": (hidden, q_dim),
            "k_proj": (hidden, kv_dim),
            "v_proj": (hidden, kv_dim),
            "o_proj": (q_dim, hidden),
        }

    def _divided_head_dim(self) -> int:
        if self.num_heads == 0 or self.hidden_size % self.num_heads:
            raise InvalidRequestError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                "give head_dim",
                hidden_size=self.hidden_size,
                num_heads=self.num_heads,
            )
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class MlpShape:
    """Widths of the feed-forward projections."""

    hidden_size: int
    intermediate_size: int

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of gate, up and down."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }


@dataclass(frozen=True, slots=True)
class LinearAttentionShape:
    """Widths of the projections of a gated delta net, the linear attention of Qwen3.5.

    Source: `Qwen3_5GatedDeltaNet` in transformers 5.
    """

    hidden_size: int
    value_heads: int
    key_heads: int = 16
    head_dim: int = 128
    """Width of a head, of keys and values alike."""

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of the four input projections and the output projection."""
        hidden, values = self.hidden_size, self.value_heads * self.head_dim
        return {
            "in_proj_qkv": (hidden, 2 * self.key_heads * self.head_dim + values),
            "in_proj_z": (hidden, values),
            "in_proj_b": (hidden, self.value_heads),
            "in_proj_a": (hidden, self.value_heads),
            "out_proj": (values, hidden),
        }


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything that decides the modules of a model."""

    attention: AttentionShape
    mlp: MlpShape
    num_layers: int
    linear_attention: LinearAttentionShape | None = None
    """Attention of all layers but each fourth, as in Qwen3.5. Full attention has a gate then."""

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of the modules of every layer, under full names."""
        full, mlp = self.attention.modules(), self.mlp.modules()
        if self.linear_attention is None:
            return layered({**full, **mlp}, self.num_layers)
        hidden, queries = full["q_proj"]
        full["q_proj"] = hidden, 2 * queries  # each head, then its gate
        linear = self.linear_attention.modules()
        return {
            _full_name(layer, name): shape
            for layer in range(self.num_layers)
            for name, shape in {**(linear if (layer + 1) % 4 else full), **mlp}.items()
        }


def layered(shapes: Shapes, num_layers: int) -> dict[str, tuple[int, int]]:
    """Return `shapes` once per layer, under the names that transformers gives Qwen3 modules."""
    return {
        _full_name(layer, name): shape
        for layer in range(num_layers)
        for name, shape in shapes.items()
    }


def _full_name(layer: int, name: str) -> str:
    block = "mlp" if name in MLP_MODULES else "linear_attn"
    return f"model.layers.{layer}.{'self_attn' if name in ATTENTION_MODULES else block}.{name}"


def _qwen3(hidden: int, inner: int, layers: int, heads: int) -> ModelShape:
    attention = AttentionShape(hidden, heads, num_kv_heads=8, head_dim=128)
    return ModelShape(attention, MlpShape(hidden, inner), layers)


def _qwen35(hidden: int, inner: int, layers: int, heads: int, value_heads: int) -> ModelShape:
    attention = AttentionShape(hidden, heads, num_kv_heads=4, head_dim=256)
    linear = LinearAttentionShape(hidden, value_heads)
    return ModelShape(attention, MlpShape(hidden, inner), layers, linear)


MODELS: Mapping[str, ModelShape] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),  # heads * head_dim = 2048
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),  # heads * head_dim = 4096
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),  # heads * head_dim = 8192
    "bonsai-1.7b": _qwen3(2048, 6144, 28, 16),
    "bonsai-4b": _qwen3(2560, 9728, 36, 32),  # heads * head_dim = 4096
    "bonsai-8b": _qwen3(4096, 12288, 36, 32),
    "bonsai-27b": _qwen35(5120, 17408, 64, 24, 48),
    "bonsai-2-4b": _qwen35(2560, 9216, 32, 16, 32),
    "bonsai-2-9b": _qwen35(4096, 12288, 32, 16, 32),
    "bonsai-2-27b": _qwen35(5120, 17408, 64, 24, 48),
}
"""Model name -> shape: `"model"` of POST /v1/sets."""
