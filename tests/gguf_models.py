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
FOUR_NORMS = {
    "post_attention_layernorm": ("post_attention_norm", (HIDDEN,)),
    "pre_feedforward_layernorm": ("ffn_norm", (HIDDEN,)),
    "post_feedforward_layernorm": ("post_ffw_norm", (HIDDEN,)),
}
FUSED = {
    "self_attn.qkv_proj": ("attn_qkv", ((HEADS + 2 * KEYS) * WIDTH, HIDDEN)),
    "self_attn.o_proj": LAYER["self_attn.o_proj"],
    "mlp.gate_up_proj": ("ffn_up", (2 * INNER, HIDDEN)),
    "mlp.down_proj": LAYER["mlp.down_proj"],
    "input_layernorm": LAYER["input_layernorm"],
    "post_attention_layernorm": LAYER["post_attention_layernorm"],
}
LINEAR_KEYS, LINEAR_VALUES, LINEAR_WIDTH = 2, 4, 32
QUERIES_KEYS = 2 * LINEAR_KEYS * LINEAR_WIDTH
VALUES = LINEAR_VALUES * LINEAR_WIDTH
MLP = {name: one for name, one in LAYER.items() if name.startswith("mlp.")}
POST_NORM = {"post_attention_layernorm": ("post_attention_norm", (HIDDEN,))}
GATED = {**LAYER, "self_attn.q_proj": ("attn_q", (2 * HEADS * WIDTH, HIDDEN))}
LINEAR = {
    "linear_attn.in_proj_qkv": ("attn_qkv", (QUERIES_KEYS + VALUES, HIDDEN)),
    "linear_attn.in_proj_z": ("attn_gate", (VALUES, HIDDEN)),
    "linear_attn.in_proj_a": ("ssm_alpha", (LINEAR_VALUES, HIDDEN)),
    "linear_attn.in_proj_b": ("ssm_beta", (LINEAR_VALUES, HIDDEN)),
    "linear_attn.out_proj": ("ssm_out", (HIDDEN, VALUES)),
    "linear_attn.norm": ("ssm_norm", (LINEAR_WIDTH,)),
    "input_layernorm": LAYER["input_layernorm"],
}
PLUS_ONE = ("gemma", "gemma2", "gemma3", "qwen35")


def layer_of(architecture, layer):
    """The tensors of a layer but for a stack of experts: names in a checkpoint, in the file, shape."""
    if architecture == "phi3":
        return FUSED
    if architecture == "qwen35":
        return {**(GATED | QK_NORMS if layer % 4 == 3 else LINEAR), **MLP, **POST_NORM}
    norms = QK_NORMS if architecture.startswith(("qwen3", "gemma3")) else {}
    return {**LAYER, **norms, **(FOUR_NORMS if architecture in ("gemma2", "gemma3") else {})}


def grouped(values):
    """Value heads in the order of a checkpoint, by key head; the file has them the other way."""
    tail = values.shape[1:]
    heads = values.reshape(LINEAR_VALUES // LINEAR_KEYS, LINEAR_KEYS, -1, *tail)
    return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(values.shape)


def grouped_qkv(values):
    return np.concatenate([values[:QUERIES_KEYS], grouped(values[QUERIES_KEYS:])])


ORDERED = {
    "linear_attn.in_proj_qkv": grouped_qkv,
    "linear_attn.in_proj_z": grouped,
    "linear_attn.in_proj_a": grouped,
    "linear_attn.in_proj_b": grouped,
    "linear_attn.out_proj": lambda values: np.ascontiguousarray(grouped(values.T).T),
}


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


def own_keys(architecture):
    """Keys that only this architecture has, as llama.cpp's converter writes them."""
    if architecture == "gemma2":
        return {
            "attention.sliding_window": np.uint32(4),
            "attn_logit_softcapping": np.float32(50),
            "final_logit_softcapping": np.float32(30),
        }
    if architecture == "gemma3":
        return {
            "attention.sliding_window": np.uint32(4),
            "attention.sliding_window_pattern": np.uint32(2),
            "rope.freq_base": np.float32(1e6),
            "rope.freq_base_swa": np.float32(1e4),
            "rope.scaling.type": "linear",
            "rope.scaling.factor": np.float32(8),
        }
    if architecture == "qwen3moe":
        return {
            "expert_count": np.uint32(EXPERTS),
            "expert_used_count": np.uint32(2),
            "expert_feed_forward_length": np.uint32(INNER),
        }
    if architecture == "phi3":
        return {
            "attention.sliding_window": np.uint32(0),
            "rope.dimension_count": np.uint32(48),
            # Below 256, llama.cpp takes the long factors.
            "rope.scaling.original_context_length": np.uint32(256),
            "context_length": np.uint32(512),
            "rope.scaling.attn_factor": np.float32(1.25),
        }
    if architecture == "qwen35":
        return {
            "block_count": np.uint32(4),
            "full_attention_interval": np.uint32(4),
            "rope.dimension_count": np.uint32(16),
            "rope.dimension_sections": np.array([3, 3, 2, 0], np.int32),
            "ssm.conv_kernel": np.uint32(4),
            "ssm.state_size": np.uint32(LINEAR_WIDTH),
            "ssm.group_count": np.uint32(LINEAR_KEYS),
            "ssm.time_step_rank": np.uint32(LINEAR_VALUES),
            "ssm.inner_size": np.uint32(VALUES),
        }
    return {}


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
        **{key(name): value for name, value in own_keys(architecture).items()},
        **more,
    }


class Builder:
    """Collects the tensors of a file and of the checkpoint that it stands for."""

    def __init__(self, rng):
        self.rng = rng
        self.tensors = {}
        self.weights = {}

    def vector(self, name, ours, count, less=0):
        values = (1 + 0.1 * self.rng.standard_normal(count)).astype(np.float32)
        self.tensors[ours] = ("F32", (count,), values.tobytes())
        self.weights[name] = values - np.float32(less)

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
    built.vector("model.norm.weight", "output_norm.weight", HIDDEN, architecture in PLUS_ONE)
    if not is_tied:
        built.matrix(kind, "lm_head.weight", "output.weight", (VOCABULARY, HIDDEN))
    for layer in range(4 if architecture == "qwen35" else LAYERS):
        add_modules(built, kind, architecture, layer)
        if architecture == "qwen35" and layer % 4 != 3:
            add_delta_net(built, layer)
        if architecture == "qwen3moe":
            add_experts(built, kind, layer)
    if architecture == "phi3":
        for half in ("long", "short"):
            factors = rng.uniform(1, 4, 24).astype(np.float32)
            built.tensors[f"rope_factors_{half}.weight"] = ("F32", (24,), factors.tobytes())
    return gguf_files.file_of(keys_of(architecture, **more), built.tensors), built.weights


def add_modules(built, kind, architecture, layer):
    for theirs, (ours, shape) in layer_of(architecture, layer).items():
        name, own = f"model.layers.{layer}.{theirs}.weight", f"blk.{layer}.{ours}.weight"
        if len(shape) == 1:
            built.vector(name, own, *shape, architecture in PLUS_ONE and ours != "ssm_norm")
        elif not (architecture == "qwen3moe" and theirs.startswith("mlp.")):
            built.matrix(kind, name, own, shape)
            if architecture == "llama" and ours in ROTATED:
                built.weights[name] = unrotated(built.weights[name], ROTATED[ours])
            if theirs in ORDERED:
                built.weights[name] = ORDERED[theirs](built.weights[name])


def add_delta_net(built, layer):
    """The parameters of linear attention that are no matrices."""
    own, theirs = f"blk.{layer}", f"model.layers.{layer}.linear_attn"
    conv = built.rng.standard_normal((QUERIES_KEYS + VALUES, 4)).astype(np.float32) / 2
    decay = built.rng.uniform(0.1, 2, LINEAR_VALUES).astype(np.float32)
    bias = built.rng.standard_normal(LINEAR_VALUES).astype(np.float32)
    built.tensors |= {
        f"{own}.ssm_conv1d.weight": ("F32", conv.shape, conv.tobytes()),
        f"{own}.ssm_a": ("F32", decay.shape, (-decay).tobytes()),
        f"{own}.ssm_dt.bias": ("F32", bias.shape, bias.tobytes()),
    }
    built.weights |= {
        f"{theirs}.conv1d.weight": grouped_qkv(conv)[:, None],
        f"{theirs}.A_log": grouped(np.log(decay)),
        f"{theirs}.dt_bias": grouped(bias),
    }


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
