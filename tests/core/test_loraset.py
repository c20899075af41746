import pytest

from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.shapes import MODELS
from bonsai_lora.errors import InvalidRequestError

# Parameters of rank-16 sets over all modules of all layers: 16 * (d_in + d_out), worked out by hand.
RANK_16_PARAMS = {
    "qwen3-0.6b": 10_092_544,
    "qwen3-1.7b": 17_432_576,
    "qwen3-4b": 33_030_144,
    "qwen3-8b": 43_646_976,
    "qwen3-14b": 64_225_280,
    "qwen3-32b": 134_217_728,
    "bonsai-1.7b": 17_432_576,
    "bonsai-4b": 33_030_144,
    "bonsai-8b": 43_646_976,
    "bonsai-27b": 116_727_808,
    "bonsai-2-4b": 32_464_896,
    "bonsai-2-9b": 43_278_336,
    "bonsai-2-27b": 116_727_808,
}


def empty(rank=2):
    return BonsaiLoraSet.new(LoraConfig(rank=rank), "base", "name")


def shapes_of(lora_set):
    return {name: (a.d_in, a.d_out) for name, a in lora_set.registry.adapters.items()}


def test_two_arguments_follow_the_reference():
    assert shapes_of(empty().add_attention_adapters(100, 8)) == {
        "q_proj": (100, 100),
        "k_proj": (100, 96),  # 100 // 8 * 8
        "v_proj": (100, 96),
        "o_proj": (100, 100),
    }
    assert shapes_of(empty().add_attention_adapters(64, 0))["k_proj"] == (64, 0)


def test_grouped_query_attention_gives_the_true_shapes():
    made = empty().add_attention_adapters(64, 4, num_kv_heads=2, head_dim=32)
    assert shapes_of(made) == {
        "q_proj": (64, 128),
        "k_proj": (64, 64),
        "v_proj": (64, 64),
        "o_proj": (128, 64),
    }
    only_kv = empty().add_attention_adapters(64, 4, num_kv_heads=2)
    assert shapes_of(only_kv)["k_proj"] == (64, 32)
    only_dim = empty().add_attention_adapters(64, 4, head_dim=32)
    assert shapes_of(only_dim)["k_proj"] == (64, 128)


def test_heads_that_do_not_divide_need_head_dim():
    with pytest.raises(InvalidRequestError, match="head_dim"):
        empty().add_attention_adapters(100, 8, num_kv_heads=2)


def test_per_layer_names():
    made = empty().add_attention_adapters(8, 2, num_layers=2).add_mlp_adapters(8, 16, num_layers=2)
    names = made.registry.module_names()
    assert len(names) == 14
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert "model.layers.1.mlp.down_proj" in names


@pytest.mark.parametrize("model", MODELS)
def test_presets_have_the_published_sizes(model):
    shapes = MODELS[model].modules()
    assert sum(16 * (d_in + d_out) for d_in, d_out in shapes.values()) == RANK_16_PARAMS[model]


def test_linear_attention_is_in_three_of_four_layers():
    shapes = MODELS["bonsai-2-27b"].modules()
    assert len(shapes) == 16 * 7 + 48 * 8
    # What the folded file says: 402 ternary matrices, which are all of these but a and b, with the
    # embedding and the head, and three input widths.
    ternary = {
        name: one for name, one in shapes.items() if name[-9:] not in ("in_proj_a", "in_proj_b")
    }
    assert len(ternary) + 2 == 402
    assert {d_in for d_in, _ in ternary.values()} == {5120, 6144, 17408}
    assert shapes["model.layers.3.self_attn.q_proj"] == (5120, 2 * 24 * 256)
    assert shapes["model.layers.4.linear_attn.in_proj_qkv"] == (5120, (16 + 16 + 48) * 128)


def test_registry_keeps_insertion_order_and_is_immutable():
    registry = empty().add_mlp_adapters(4, 8).registry
    assert registry.module_names() == ("gate_proj", "up_proj", "down_proj")
    smaller = registry.remove("up_proj")
    assert registry.adapter_count() == 3
    assert smaller.module_names() == ("gate_proj", "down_proj")
    assert smaller.total_memory_bytes() == 4 * smaller.total_param_count() == 4 * 2 * (12 + 12)
    with pytest.raises(TypeError):
        registry.adapters["x"] = None
