"""config.json of transformers, made from the keys of a GGUF file.

Keys: gguf-py/gguf/constants.py of llama.cpp (release b11434). Fields: the configuration classes of
transformers 5, as transformers 4 reads them, too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bonsai_lora.formats.gguf import Header
from bonsai_lora.formats.gguf_values import Scalar

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""Architecture -> model_type and class; what the file says is all that these need."""
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def config_of(header: Header, *, dtype: str, is_tied: bool) -> dict[str, Any] | None:
    """Return the configuration of a model; None for an architecture whose fields are unknown.

    `dtype` is that of the weights, `is_tied` whether the head is the embedding.
    """
    known = _CLASSES.get(header.architecture)
    if known is None:
        return None
    model_type, name = known

    def get(key: str) -> Scalar | None:
        found = header.get(f"{header.architecture}.{key}")
        if found is None:  # early files of PrismML
            found = header.get(f"llm.{key}")
        # The shortest decimal that is the same float32: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "torch_dtype": _DTYPES[dtype],
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "vocab_size": _vocabulary(header),
    }
    config |= {field: get(key) for field, key in _FIELDS.items()}
    config |= {field: header.get(key) for field, key in _TOKENS.items()}
    config["rope_scaling"] = _scaling(get)
    if model_type == "qwen3_moe":
        config |= {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    return {field: value for field, value in config.items() if value is not None}


def _vocabulary(header: Header) -> int | None:
    embedding = header.tensors.get("token_embd.weight")
    return None if embedding is None or len(embedding.shape) != 2 else embedding.shape[0]


def _scaling(get: Callable[[str], Scalar | None]) -> Mapping[str, Any] | None:
    kind, factor = get("rope.scaling.type"), get("rope.scaling.factor")
    if kind in (None, "none") or factor is None:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = get("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling
