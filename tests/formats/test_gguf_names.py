"""Names of tensors both ways, and the order of their rows, against what llama.cpp's converter does."""

import gguf_files
import numpy as np
import pytest

from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats import gguf, gguf_names
from bonsai_lora.formats.gguf_names import Change, Counterpart, Heads, to_gguf, to_hugging_face

LAYER = "model.layers.7."

EXAMPLES = [
    ("qwen3", "model.embed_tokens.weight", "token_embd.weight", Change.NONE),
    ("qwen3", "model.norm.weight", "output_norm.weight", Change.NONE),
    ("qwen3", "lm_head.weight", "output.weight", Change.NONE),
    ("qwen3", f"{LAYER}self_attn.q_proj.weight", "blk.7.attn_q.weight", Change.NONE),
    ("qwen3", f"{LAYER}self_attn.o_proj.weight", "blk.7.attn_output.weight", Change.NONE),
    ("qwen3", f"{LAYER}self_attn.k_norm.weight", "blk.7.attn_k_norm.weight", Change.NONE),
    ("qwen3", f"{LAYER}mlp.down_proj.weight", "blk.7.ffn_down.weight", Change.NONE),
    ("qwen3", f"{LAYER}post_attention_layernorm.weight", "blk.7.ffn_norm.weight", Change.NONE),
    ("qwen2", f"{LAYER}self_attn.v_proj.bias", "blk.7.attn_v.bias", Change.NONE),
    ("llama", f"{LAYER}self_attn.q_proj.weight", "blk.7.attn_q.weight", Change.Q_ROWS),
    ("llama", f"{LAYER}self_attn.k_proj.weight", "blk.7.attn_k.weight", Change.K_ROWS),
    ("llama", f"{LAYER}self_attn.v_proj.weight", "blk.7.attn_v.weight", Change.NONE),
    ("qwen3moe", f"{LAYER}mlp.gate.weight", "blk.7.ffn_gate_inp.weight", Change.NONE),
    ("gemma", f"{LAYER}input_layernorm.weight", "blk.7.attn_norm.weight", Change.PLUS_ONE),
    ("gemma", "model.norm.weight", "output_norm.weight", Change.PLUS_ONE),
    (
        "gemma2",
        f"{LAYER}post_attention_layernorm.weight",
        "blk.7.post_attention_norm.weight",
        Change.PLUS_ONE,
    ),
    ("gemma3", f"{LAYER}self_attn.q_norm.weight", "blk.7.attn_q_norm.weight", Change.PLUS_ONE),
    (
        "gemma3",
        f"{LAYER}post_feedforward_layernorm.weight",
        "blk.7.post_ffw_norm.weight",
        Change.PLUS_ONE,
    ),
    ("phi3", f"{LAYER}self_attn.qkv_proj.weight", "blk.7.attn_qkv.weight", Change.NONE),
    ("phi3", f"{LAYER}mlp.gate_up_proj.weight", "blk.7.ffn_up.weight", Change.NONE),
    ("qwen35", f"{LAYER}linear_attn.in_proj_qkv.weight", "blk.7.attn_qkv.weight", Change.QKV_ROWS),
    ("qwen35", f"{LAYER}linear_attn.out_proj.weight", "blk.7.ssm_out.weight", Change.V_COLUMNS),
    ("qwen35", f"{LAYER}linear_attn.norm.weight", "blk.7.ssm_norm.weight", Change.NONE),
    ("qwen35", f"{LAYER}linear_attn.A_log", "blk.7.ssm_a", Change.DECAY),
    ("qwen35", f"{LAYER}linear_attn.dt_bias", "blk.7.ssm_dt.bias", Change.V_ROWS),
    ("qwen35", f"{LAYER}self_attn.q_proj.weight", "blk.7.attn_q.weight", Change.NONE),
]


@pytest.mark.parametrize(("architecture", "theirs", "ours", "change"), EXAMPLES)
def test_a_name_both_ways(architecture, theirs, ours, change):
    assert to_gguf(architecture, theirs) == Counterpart(ours, change)
    assert to_hugging_face(architecture, ours) == Counterpart(theirs, change)
    assert not gguf_names.is_stack(architecture, ours)


def test_experts_are_stacked():
    theirs, ours = f"{LAYER}mlp.experts.12.up_proj.weight", "blk.7.ffn_up_exps.weight"
    assert to_gguf("qwen3moe", theirs) == Counterpart(ours, expert=12)
    assert to_hugging_face("qwen3moe", ours, 12) == Counterpart(theirs, expert=12)
    assert gguf_names.is_stack("qwen3moe", ours)
    assert to_hugging_face("qwen3moe", ours) is None
    assert to_hugging_face("qwen3moe", "blk.7.attn_q.weight", 12) is None


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_names_of_multimodal_models(prefix):
    for inner in ("embed_tokens.weight", "layers.3.mlp.up_proj.weight"):
        assert to_gguf("gemma3", prefix + inner) == to_gguf("gemma3", f"model.{inner}") is not None
    assert to_gguf("gemma3", "language_model.lm_head.weight").name == "output.weight"


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("qwen3", "model.layers.7.mlp.gate.weight"),
        ("qwen3", "model.layers.x.mlp.up_proj.weight"),
        ("qwen3", "model.layers.07.mlp.up_proj.weight"),
        pytest.param("qwen3", f"model.layers.{'7' * 5000}.mlp.up_proj.weight", id="5000 digits"),
        ("qwen3", "model.layers.\u0667.mlp.up_proj.weight"),
        ("qwen3", "model.layers.{}.mlp.up_proj.weight"),
        ("qwen3", "model.layers.7.8.mlp.up_proj.weight"),
        ("qwen3", "blk.7.attn_q.weight"),
        ("qwen3", ""),
        ("gemma2", "lm_head.weight"),
        ("mamba", "model.norm.weight"),
        ("qwen3moe", "model.layers.1.mlp.experts.2.3.up_proj.weight"),
    ],
)
def test_an_unknown_name(architecture, name):
    assert to_gguf(architecture, name) is None


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "rope_freqs.weight"),
        ("gemma", "output.weight"),
        ("qwen3", "blk.{}.ffn_up.weight"),
        ("qwen3", "blk.01.ffn_up.weight"),
        ("", "token_embd.weight"),
    ],
)
def test_a_name_that_checkpoints_lack(architecture, name):
    assert to_hugging_face(architecture, name) is None


def test_every_known_name_comes_back():
    for architecture in gguf_names.ARCHITECTURES:
        forth, back = gguf_names._tables(architecture)
        assert len(forth) == len(back)
        for template in forth:
            theirs = template.replace("{}", "5", 1).replace("{}", "9")
            found = to_gguf(architecture, theirs)
            assert to_hugging_face(architecture, found.name, found.expert).name == theirs


def test_rows_of_rotated_heads(rng):
    """As `permute` of conversion/llama.py: (heads, 2, half, in) with the middle axes exchanged."""
    heads = Heads(queries=4, keys=2)
    for change, count in ((Change.Q_ROWS, 4), (Change.K_ROWS, 2)):
        weights = rng.standard_normal((count * 6, 5))
        want = weights.reshape(count, 2, 3, 5).swapaxes(1, 2).reshape(weights.shape)
        order = gguf_names.row_order(change, heads, len(weights))
        assert np.array_equal(weights[order], want)
        assert gguf_names.column_order(change, heads, 12) is None


def test_value_heads(rng):
    """From grouped by key head, k0v0 k0v1 k0v2 k1v0 …, to k0v0 k1v0 k0v1 k1v1 …"""
    heads = Heads(linear_keys=2, linear_values=6, linear_key_width=4)
    rows = np.arange(6 * 2)
    want = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert rows[gguf_names.row_order(Change.V_ROWS, heads, 12)].tolist() == want
    assert gguf_names.column_order(Change.V_COLUMNS, heads, 12).tolist() == want
    assert gguf_names.row_order(Change.DECAY, heads, 6).tolist() == [0, 3, 1, 4, 2, 5]
    for change in (Change.QKV_ROWS, Change.CONVOLUTION):
        order = gguf_names.row_order(change, heads, 16 + 12)
        assert order.tolist() == [*range(16), *(16 + one for one in want)]
    for change in (Change.NONE, Change.PLUS_ONE, Change.V_COLUMNS):
        assert gguf_names.row_order(change, heads, 12) is None


def test_value_heads_stay_if_there_is_one_per_key():
    heads = Heads(linear_keys=4, linear_values=4, linear_key_width=4)
    for change in (Change.V_ROWS, Change.QKV_ROWS):
        assert gguf_names.row_order(change, heads, 48) is None


def test_heads_that_do_not_divide_the_rows_are_refused():
    for heads, change, rows in (
        (Heads(queries=0), Change.Q_ROWS, 12),
        (Heads(queries=4), Change.Q_ROWS, 12),
        (Heads(linear_keys=2, linear_values=3), Change.V_ROWS, 12),
        (Heads(linear_keys=2, linear_values=4), Change.V_ROWS, 14),
        (Heads(linear_keys=2, linear_values=4, linear_key_width=9), Change.QKV_ROWS, 14),
        (Heads(linear_keys=0, linear_values=4), Change.V_ROWS, 12),
        (Heads(), Change.V_ROWS, 12),
        (Heads(), Change.QKV_ROWS, 12),
        (Heads(linear_keys=2, linear_values=4), Change.QKV_ROWS, 12),
    ):
        with pytest.raises(UnsupportedGgufError, match="are not divided by"):
            gguf_names.row_order(change, heads, rows)


def test_heads_of_a_header():
    def heads_of(**values):
        pairs = {"general.architecture": "qwen35"}
        pairs |= {f"qwen35.{key.replace('__', '.')}": one for key, one in values.items()}
        raw = gguf_files.file_of(pairs, {})
        return Heads.of(gguf.read_header(gguf.reader_of(raw), len(raw)))

    assert heads_of() == Heads()
    assert heads_of(attention__head_count=np.uint32(8)) == Heads(queries=8, keys=8)
    assert heads_of(
        attention__head_count=np.uint32(8),
        attention__head_count_kv=np.uint32(2),
        ssm__group_count=np.uint32(16),
        ssm__time_step_rank=np.uint32(48),
        ssm__state_size=np.uint32(128),
    ) == Heads(8, 2, 16, 48, 128)
    per_layer = heads_of(
        attention__head_count=np.uint32(8), attention__head_count_kv=np.array([1, 2], np.uint32)
    )
    assert per_layer.keys == 0
