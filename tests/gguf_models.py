"""Tiny models as GGUF files in any type, and the weights that they stand for.

The weights, by their names in a checkpoint, are float32 arrays made here from the stored values, with
the formulas of llama.cpp's converter.
"""

import gguf_files
import numpy as np

from bonsai_lora.formats import gguf
from bonsai_lora.formats.dequantize import dequantize
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.hadamard import PREFIX

HIDDEN, HEADS, KEYS, WIDTH, INNER, VOCABULARY, LAYERS, EXPERTS = 256, 4, 2, 64, 512, 96, 2, 4

LAYER = {
    "self_attn.q_proj": ("attn_q", (HEADS * WIDTH, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (KEYS * WIDTH, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (KEYS * WIDTH, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HEADS * WIDTH)),
    "mlp.gate_proj": ("ffn_gate", (INNER, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (INNER, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, INNER)),
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
}
QK_NORMS = {
    "self_attn.q_norm": ("attn_q_norm", (WIDTH,)),
    "self_attn.k_norm": ("attn_k_norm", (WIDTH,)),
}
STACKS = {
    f"mlp.experts.{{}}.{one}_proj": (f"ffn_{one}_exps", LAYER[f"mlp.{one}_proj"][1])
    for one in ("gate", "up", "down")
}
ROTATED = {"attn_q": HEADS, "attn_k": KEYS}


def stored_values(kind, count, rng):
    """Bytes of blocks, and their values: about as large as the weights of a model."""
    if kind in ("F32", "F16", "BF16"):
        values = (rng.standard_normal(count) * 0.04).astype(np.float32)
        raw = gguf_files.encode(kind, values)
    elif kind in gguf_files.ENCODERS:
        values = gguf_files.ternary(count, rng, block=256)
        values = (
            np.sign(values + 1e-9) * np.repeat(np.abs(values[::256]), 256)
            if kind == "Q1_0"
            else values
        )
        raw = gguf_files.encode(kind, values.astype(np.float32))
    else:
        blocks = (
            np.frombuffer(
                gguf_files.random_blocks(kind, count // BY_NAME[kind].block, rng), np.uint8
            )
            .reshape(-1, BY_NAME[kind].size)
            .copy()
        )
        for at in gguf_files.SCALES.get(kind, [0]):
            scale = rng.uniform(1e-4, 8e-4, (len(blocks), 1)) / (20 if kind.endswith("_K") else 1)
            blocks[:, at : at + 2] = scale.astype("<f2").view(np.uint8)
        raw = blocks.tobytes()
    return raw, dequantize(BY_NAME[kind], raw)


def unrotated(values, heads):
    """The rows of a checkpoint: halves of each head, which the file has as even and odd rows."""
    rows, width = values.shape
    return values.reshape(heads, -1, 2, width).swapaxes(1, 2).reshape(rows, width)


def keys_of(architecture, **more):
    def key(name):
        return f"{architecture}.{name}"

    return {
        "general.architecture": architecture,
        "general.name": "tiny",
        "general.file_type": np.uint32(40),
        "general.quantization_version": np.uint32(2),
        key("block_count"): np.uint32(LAYERS),
        key("context_length"): np.uint32(128),
        key("embedding_length"): np.uint32(HIDDEN),
        key("feed_forward_length"): np.uint32(INNER),
        key("attention.head_count"): np.uint32(HEADS),
        key("attention.head_count_kv"): np.uint32(KEYS),
        key("attention.key_length"): np.uint32(WIDTH),
        key("attention.value_length"): np.uint32(WIDTH),
        key("rope.freq_base"): np.float32(10000),
        key("rope.dimension_count"): np.uint32(WIDTH),
        key("attention.layer_norm_rms_epsilon"): np.float32(1e-6),
        key("vocab_size"): np.uint32(VOCABULARY),
        "tokenizer.ggml.model": "none",
        **more,
    }


class Builder:
    """Collects the tensors of a file and of the checkpoint that it stands for."""

    def __init__(self, rng):
        self.rng = rng
        self.tensors = {}
        self.weights = {}

    def vector(self, name, ours, count):
        values = (1 + 0.1 * self.rng.standard_normal(count)).astype(np.float32)
        self.tensors[ours] = ("F32", (count,), values.tobytes())
        self.weights[name] = values

    def matrix(self, kind, name, ours, shape):
        raw, values = stored_values(kind, int(np.prod(shape)), self.rng)
        self.tensors[ours] = (kind, shape, raw)
        self.weights[name] = values.reshape(shape)


def model(kind, rng, *, architecture="qwen3", is_tied=False, **more):
    """The bytes of a file whose matrices have the type `kind`, and the weights by name.

    `more` are further keys.
    """
    built = Builder(rng)
    built.matrix(kind, "model.embed_tokens.weight", "token_embd.weight", (VOCABULARY, HIDDEN))
    built.vector("model.norm.weight", "output_norm.weight", HIDDEN)
    if not is_tied:
        built.matrix(kind, "lm_head.weight", "output.weight", (VOCABULARY, HIDDEN))
    modules = {**LAYER, **(QK_NORMS if architecture.startswith("qwen3") else {})}
    for layer in range(LAYERS):
        for theirs, (ours, shape) in modules.items():
            name, own = f"model.layers.{layer}.{theirs}.weight", f"blk.{layer}.{ours}.weight"
            if len(shape) == 1:
                built.vector(name, own, *shape)
            elif not (architecture == "qwen3moe" and theirs.startswith("mlp.")):
                built.matrix(kind, name, own, shape)
                if architecture == "llama" and ours in ROTATED:
                    built.weights[name] = unrotated(built.weights[name], ROTATED[ours])
        if architecture == "qwen3moe":
            add_experts(built, kind, layer)
            more |= {
                "qwen3moe.expert_count": np.uint32(EXPERTS),
                "qwen3moe.expert_used_count": np.uint32(2),
                "qwen3moe.expert_feed_forward_length": np.uint32(INNER),
            }
    return gguf_files.file_of(keys_of(architecture, **more), built.tensors), built.weights


def add_experts(built, kind, layer):
    router = f"blk.{layer}.ffn_gate_inp.weight"
    built.matrix("F32", f"model.layers.{layer}.mlp.gate.weight", router, (EXPERTS, HIDDEN))
    for theirs, (ours, shape) in STACKS.items():
        name = f"model.layers.{layer}.{theirs}.weight"
        built.matrix(kind, name, f"blk.{layer}.{ours}.weight", (EXPERTS, *shape))
        stack = built.weights.pop(name)
        built.weights |= {name.format(number): stack[number] for number in range(EXPERTS)}


def folded(rng, **more):
    """A file whose projections are folded, and the plain weights."""
    raw, weights = model("Q2_0", rng)
    header = gguf.read_header(gguf.reader_of(raw), len(raw))
    names = [name for name in header.tensors if "ffn_" in name and "norm" not in name]
    signs = {width: rng.choice([-1, 1], width) for width in (256, 512)}
    keys = {
        f"{PREFIX}version": np.uint32(1),
        f"{PREFIX}block_size": np.uint32(128),
        f"{PREFIX}transform": "normalized-sylvester-walsh-hadamard",
        f"{PREFIX}axis": "input-last-dimension",
        f"{PREFIX}sign_mode": "explicit",
        f"{PREFIX}sign_widths": np.array([*signs], np.int32),
        f"{PREFIX}sign_values": np.concatenate([*signs.values()]).astype(np.int32),
        f"{PREFIX}weight_names": names,
        **more,
    }
    tensors = {
        name: (one.type.name, one.shape, raw[one.start : one.stop])
        for name, one in header.tensors.items()
    }
    index = np.arange(128)
    hadamard = (1 - 2 * (np.bitwise_count(index[:, None] & index) & 1).astype(float)) / np.sqrt(128)
    for layer in range(2):
        for part in ("gate", "up", "down"):
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            width = weights[name].shape[1]
            dense = np.kron(np.eye(width // 128), hadamard)
            weights[name] = ((weights[name] @ dense) * signs[width]).astype(np.float32)
    return gguf_files.file_of({**keys_of("qwen3"), **keys}, tensors), weights
