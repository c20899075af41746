"""config.json of transformers, made from the keys of a GGUF file.

Keys and defaults: gguf-py/gguf/constants.py, conversion/ and src/models/ of llama.cpp (release
b11434). Fields: the configuration classes of transformers 5, of older architectures those that
transformers 4 reads, too. What the keys do not say is refused, never guessed.
"""

from collections.abc import Callable, Mapping
from math import isfinite, prod
from typing import Any

import numpy as np

from bonsai_lora.core.config import shortest_float32
from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats.dequantize import read_rows
from bonsai_lora.formats.dtypes import FLOAT_DTYPES
from bonsai_lora.formats.gguf import Header
from bonsai_lora.formats.gguf_names import GGUF_EMBEDDING
from bonsai_lora.formats.gguf_values import ReadAt, Scalar, ValueType, read_array

ROPE_TABLES = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)
"""Tensors of a GGUF file whose values a checkpoint has in its configuration."""

_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_YARN = {
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_FREQUENCY_BASE = 10_000.0
"""llama.cpp's default of rope.freq_base; classes of transformers have defaults of their own."""
_MOST_VALUES = 1 << 16
"""Longest array that is read."""


def config_of(header: Header, read: ReadAt, *, dtype: str, is_tied: bool) -> dict[str, Any]:
    """Return the configuration of a model.

    `dtype` is that of the weights, `is_tied` whether the head is the embedding. Raises
    UnsupportedGgufError with the reason if the keys do not say what the configuration needs.
    """
    keys = _Keys(header, read)
    if header.architecture not in _FAMILIES:
        raise _unknown(
            f"for architecture {header.architecture[:100]!r}; it can be for one of "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    model_type, name, family = _FAMILIES[header.architecture]
    config = {
        "architectures": [name],
        "model_type": model_type,
        **weights_fields(dtype, is_tied=is_tied),
        **_sizes(keys),
        **family(keys),
    }
    made = {field: value for field, value in config.items() if value is not None}
    return {**made, **_tokens(keys)}


def weights_fields(dtype: str, *, is_tied: bool) -> dict[str, Any]:
    """Return the fields of a configuration that say how the weights are stored."""
    return {"tie_word_embeddings": is_tied, "torch_dtype": FLOAT_DTYPES[dtype].name}


class _Keys:
    """The keys of one architecture, each checked when it is read."""

    def __init__(self, header: Header, read: ReadAt) -> None:
        self.header, self.read = header, read

    def name(self, key: str) -> str:
        own = f"{self.header.architecture}.{key}"
        early = f"llm.{key}"  # of PrismML's first files
        return early if own not in self.header.pairs and early in self.header.pairs else own

    def scalar(self, key: str) -> Scalar | None:
        return self.header.get(self.name(key))

    def find(self, key: str) -> int | None:
        """Return a whole number; None if the key is missing."""
        name = self.name(key)
        if name not in self.header.pairs:
            return None
        found = self.header.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            what = "an array" if found is None else f"{str(found)[:100]!r}"
            raise _unknown(f"since {name} is {what}, not one whole number")
        return found

    def need(self, key: str) -> int:
        """Return a whole number above 0."""
        found = self.find(key)
        if not found:
            raise _unknown(f"since {self.name(key)} is {'missing' if found is None else 0}")
        return found

    def real(self, key: str) -> float | None:
        """Return a number as the shortest decimal of the same float32; None if missing."""
        found = self.scalar(key)
        if found is None:
            return None
        shortest = found if isinstance(found, str | bool) else shortest_float32(found)
        if isinstance(shortest, str | bool) or not isfinite(shortest):
            raise _unknown(f"since {self.name(key)} is {str(found)[:100]!r}, not a finite number")
        return shortest

    def array(self, key: str, count: int) -> list[Any] | None:
        """Return the first `count` numbers of an array; None if it is missing."""
        value = self.header.pairs.get(self.name(key))
        if value is None or value.item is None:
            return None
        if value.item is ValueType.STRING or not count <= value.count <= _MOST_VALUES:
            raise _unknown(f"since {self.name(key)} has {value.count} values, not {count} numbers")
        found: list[Any] = np.asarray(read_array(self.read, value))[:count].tolist()
        return found

    @property
    def layers(self) -> int:
        """Layers without those that predict further tokens."""
        count = self.need("block_count") - (self.find("nextn_predict_layers") or 0)
        if not 0 < count <= len(self.header.tensors):
            raise _unknown(f"since {self.name('block_count')} does not fit the tensors")
        return count

    @property
    def head_dim(self) -> int:
        return self.find("attention.key_length") or self.width_by_heads

    @property
    def width_by_heads(self) -> int:
        """The hidden size divided by the heads, the width of a head unless the file says so."""
        width = self.need("embedding_length") // self.need("attention.head_count")
        if not width:
            raise _unknown(f"since {self.name('embedding_length')} is less than the heads")
        return width

    @property
    def frequency_base(self) -> float:
        return self.real("rope.freq_base") or _FREQUENCY_BASE


def _sizes(keys: _Keys) -> dict[str, Any]:
    """Return what all architectures have."""
    embedding = keys.header.tensors.get(GGUF_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise _unknown("since token_embd.weight is missing")
    epsilon = keys.real("attention.layer_norm_rms_epsilon")
    if epsilon is None:
        raise _unknown(f"since {keys.name('attention.layer_norm_rms_epsilon')} is missing")
    heads = keys.need("attention.head_count")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.need("embedding_length"),
        "intermediate_size": keys.find("feed_forward_length"),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.find("attention.head_count_kv") or heads,
        "max_position_embeddings": keys.find("context_length"),
        "rms_norm_eps": epsilon,
    }


def _tokens(keys: _Keys) -> dict[str, int | None]:
    """Return the special tokens; null where the file has none, as classes have defaults."""
    rows = keys.header.tensors[GGUF_EMBEDDING].shape[0]
    found = {field: keys.header.get(key) for field, key in _TOKENS.items()}
    return {
        field: one if isinstance(one, int) and 0 <= one < rows else None
        for field, one in found.items()
    }


def _plain(keys: _Keys) -> dict[str, Any]:
    """Return the fields of llama and Qwen, whose heads are rotated as a whole."""
    keys.need("feed_forward_length")
    return {
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in keys.header.tensors,
        **_whole_rotation(keys),
    }


def _experts(keys: _Keys) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in keys.header.tensors,
        "num_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
        "moe_intermediate_size": keys.need("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        **_whole_rotation(keys),
    }


def _gemma(keys: _Keys) -> dict[str, Any]:
    keys.need("feed_forward_length")
    activation = "gelu_pytorch_tanh"
    return {
        "hidden_act": activation,
        "hidden_activation": activation,
        "head_dim": keys.head_dim,
        **_whole_rotation(keys),
    }


def _gemma2(keys: _Keys) -> dict[str, Any]:
    return {
        **_gemma(keys),
        "query_pre_attn_scalar": _attention_scalar(keys, largest=46),
        "sliding_window": keys.find("attention.sliding_window") or 4096,
        "layer_types": _windows(keys, every=2),
        "attn_logit_softcapping": keys.real("attn_logit_softcapping") or 50.0,
        "final_logit_softcapping": keys.real("final_logit_softcapping") or 30.0,
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    window = keys.find("attention.sliding_window") or 0
    kinds = _windows(keys, every=6) if window else ["full_attention"] * keys.layers
    return {
        **_gemma(keys),
        "query_pre_attn_scalar": _attention_scalar(keys, largest=62),
        "sliding_window": window or 4096,
        "layer_types": kinds,
        "rope_local_base_freq": keys.real("rope.freq_base_swa") or _FREQUENCY_BASE,
        "final_logit_softcapping": keys.real("final_logit_softcapping"),
    }


def _attention_scalar(keys: _Keys, largest: int) -> int:
    """Return the square of what scores are divided by: of the 27B models, hidden size by heads."""
    if keys.layers == largest:
        return keys.width_by_heads
    return keys.head_dim


def _windows(keys: _Keys, every: int) -> list[str]:
    key = "attention.sliding_window_pattern"
    return _kinds_of_layers(keys, "sliding_attention", key, key, every)


def _kinds_of_layers(keys: _Keys, kind: str, flags_key: str, key: str, every: int) -> list[str]:
    """Return the kind of attention of each layer, by flags, or full for each `every`-th."""
    flags = keys.array(flags_key, keys.layers)
    if flags is None:
        every = keys.find(key) or every
        flags = [bool((layer + 1) % every) for layer in range(keys.layers)]
    return [kind if one else "full_attention" for one in flags]


def _phi3(keys: _Keys) -> dict[str, Any]:
    keys.need("feed_forward_length")
    width = keys.width_by_heads
    rotated = keys.find("rope.dimension_count") or width
    return {
        "hidden_act": "silu",
        "rope_theta": keys.frequency_base,
        "partial_rotary_factor": rotated / width,
        "rope_scaling": _long_rope(keys),
        "original_max_position_embeddings": keys.find("rope.scaling.original_context_length"),
        "sliding_window": keys.find("attention.sliding_window") or None,
    }


def _long_rope(keys: _Keys) -> Mapping[str, Any] | None:
    """Return the factors of long contexts, which the file has as tensors."""
    tables = {half: f"rope_factors_{half}.weight" for half in ("long", "short")}
    if not any(name in keys.header.tensors for name in tables.values()):
        return None
    scaling: dict[str, Any] = {"rope_type": "longrope", "type": "longrope"}
    for half, name in tables.items():
        info = keys.header.tensors.get(name)
        if info is None or prod(info.shape) > _MOST_VALUES:
            raise _unknown(f"since {name} is missing or too long")
        scaling[f"{half}_factor"] = [
            shortest_float32(float(one)) for one in read_rows(keys.read, info, 0, 1)[0]
        ]
    factor = keys.real("rope.scaling.attn_factor")
    return scaling if factor is None else {**scaling, "attention_factor": factor}


def _qwen35(keys: _Keys) -> dict[str, Any]:
    keys.need("feed_forward_length")
    heads = keys.need("ssm.time_step_rank")
    rotated = keys.find("rope.dimension_count") or keys.head_dim
    flags, interval = "attention.recurrent_layers", "full_attention_interval"
    return {
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "attn_output_gate": True,
        "layer_types": _kinds_of_layers(keys, "linear_attention", flags, interval, 4),
        "linear_conv_kernel_dim": keys.need("ssm.conv_kernel"),
        "linear_key_head_dim": keys.need("ssm.state_size"),
        "linear_value_head_dim": keys.need("ssm.inner_size") // heads,
        "linear_num_key_heads": keys.need("ssm.group_count"),
        "linear_num_value_heads": heads,
        "rope_parameters": {
            **(_scaling(keys) or {"rope_type": "default"}),
            "rope_theta": keys.frequency_base,
            "partial_rotary_factor": rotated / keys.head_dim,
            "mrope_section": keys.array("rope.dimension_sections", 3) or [11, 11, 10],
            "mrope_interleaved": True,
        },
    }


def _whole_rotation(keys: _Keys) -> dict[str, Any]:
    """Return the rotation of architectures that rotate whole heads."""
    rotated = keys.find("rope.dimension_count")
    if rotated not in (None, keys.head_dim):
        raise _unknown(
            f"since {rotated} of the {keys.head_dim} values of a head are rotated, not all"
        )
    return {"rope_theta": keys.frequency_base, "rope_scaling": _scaling(keys)}


def _scaling(keys: _Keys) -> Mapping[str, Any] | None:
    found = sorted(ROPE_TABLES & keys.header.tensors.keys())
    if found:
        raise _unknown(f"since {found[0]} does not say how it was computed")
    kind, factor = keys.scalar("rope.scaling.type"), keys.real("rope.scaling.factor")
    if kind in (None, "none") or factor is None:
        return None
    if kind not in ("linear", "yarn"):
        raise _unknown(f"since {keys.name('rope.scaling.type')} is {str(kind)[:100]!r}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = keys.find("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
        scaling |= {field: keys.real(key) for field, key in _YARN.items()}
    return {field: value for field, value in scaling.items() if value is not None}


def _unknown(why: str) -> UnsupportedGgufError:
    return UnsupportedGgufError(
        f"the GGUF file has no config.json beside it, and none can be made {why}; put the model's "
        "config.json beside the file, in a folder with the name of the base, or pull the model as "
        "a GGUF file"
    )


_FAMILIES: Mapping[str, tuple[str, str, Callable[[_Keys], dict[str, Any]]]] = {
    "llama": ("llama", "LlamaForCausalLM", _plain),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _plain),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _plain),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _experts),
    "gemma": ("gemma", "GemmaForCausalLM", _gemma),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _gemma2),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _gemma3),
    "phi3": ("phi3", "Phi3ForCausalLM", _phi3),
    "qwen35": ("qwen3_5_text", "Qwen3_5ForCausalLM", _qwen35),
}
"""Architecture -> model_type, class, and the function that returns its own fields."""

MODEL_TYPES = {architecture: one[0] for architecture, one in _FAMILIES.items()}
"""Architecture -> model_type of the same model in transformers 5."""
