"""An adapter_config.json that is written here means, to peft's rules, what the set is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.formats.peft import encode_config
from bonsai_lora.formats.peft_config import PeftConfig


def made(modules, rank=2, alpha=8.0):
    """A set of `modules`: name -> (rank, alpha, scaling)."""
    adapters = {
        name: LoraAdapter(
            LoraConfig(r, own), np.ones((r, 3), np.float32), np.ones((2, r), np.float32), scaling
        )
        for name, (r, own, scaling) in modules.items()
    }
    empty = BonsaiLoraSet.new(LoraConfig(rank, alpha), "base", "s")
    return empty.with_registry(empty.registry.add_all(adapters))


def meant(modules, **config):
    """Rank and scaling of each module as peft reads what was written."""
    written = encode_config(made(modules, **config), None)
    read = PeftConfig(written)
    assert all(read.targets(name) for name in modules)
    said = read.scalings(modules)
    return {name: (one.rank.value, scaling(one)) for name, one in said.items()}, written


def scaling(said):
    rank = said.rank.value
    return said.of("any", rank)[1]


@pytest.mark.parametrize(
    "names",
    [
        ["x", "y.x"],
        ["y.x", "x"],
        ["x", "y.x", "z.y.x"],
        ["y.x", "z.y.x"],
        ["x", "yx"],
        ["yx", "x"],
        ["a.x", "a_x"],
        ["a_x", "a.x"],
        ["b.a.x", "b.a_x", "a-x", "a.x"],
        ["layers.1.x", "layers.11.x", "layers.1_x"],
        ["x-1", "x"],
        [".".join("x" * n) + "x" * (170 - 2 * n) for n in range(1, 80)] + ["y"],
    ],
    ids=" ".join,
)
def test_patterns_name_one_module_each(names):
    modules = {name: (n + 3, float(n + 1), (n + 1) / (n + 3)) for n, name in enumerate(names)}
    found, _ = meant(modules)
    for name, (rank, _, scaling) in modules.items():
        assert found[name] == (rank, pytest.approx(scaling, rel=1e-7)), name


NAMES = st.lists(st.sampled_from(["x", "y", "x_1", "x-1", "1"]), min_size=1, max_size=3).map(
    ".".join
)
KINDS = st.tuples(
    st.integers(1, 5), st.sampled_from([8.0, 1.0, 0.3]), st.sampled_from([None, 0.7, 2.0])
)


@given(st.dictionaries(NAMES, KINDS, min_size=1, max_size=5))
@settings(max_examples=200)
def test_any_ranks_and_scalings_come_back(drawn):
    modules = {
        name: (rank, alpha, float(np.float32(alpha / rank if scaling is None else scaling)))
        for name, (rank, alpha, scaling) in drawn.items()
    }
    found, _ = meant(modules)
    assert {
        name: (rank, float(np.float32(scaling))) for name, (rank, scaling) in found.items()
    } == {name: (rank, scaling) for name, (rank, _, scaling) in modules.items()}


@pytest.mark.parametrize("rank", range(1, 12))
@pytest.mark.parametrize("alpha", [1.0, 8.0, 0.3, 16.0])
def test_what_all_modules_share_is_written_once(rank, alpha):
    """An upload's scaling is kept in the shortest form of its float32, not in its binary one."""
    config = PeftConfig({"peft_type": "LORA", "r": rank, "lora_alpha": alpha})
    own = scaling(config.scalings(["q_proj"])["q_proj"])
    shared = (rank, alpha, own)
    found, written = meant({"q_proj": shared, "v_proj": shared}, rank=rank, alpha=alpha)
    assert written["alpha_pattern"] == written["rank_pattern"] == {}
    assert (written["r"], written["lora_alpha"]) == (rank, alpha)
    assert set(found.values()) == {(rank, own)}


def test_every_field_of_what_is_written():
    """For peft to load it as it is, and for people to read it."""
    modules = {
        "model.layers.0.self_attn.q_proj": (2, 8.0, 4.0),
        "model.layers.0.mlp.up_proj": (3, 8.0, 8.0 / 3),
        "model.layers.1.mlp.up_proj": (2, 5.0, 2.5),
    }
    _, written = meant(modules)
    assert written == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"model.layers.0.mlp.up_proj": 3},
        "alpha_pattern": {"model.layers.1.mlp.up_proj": 5.0},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def test_a_set_without_modules_or_rank_or_base():
    empty = BonsaiLoraSet.new(LoraConfig(0, 3.0, target_modules=("k_proj",)), "", "s")
    written = encode_config(empty, None)
    assert written["r"] == 1  # peft takes no less
    assert written["base_model_name_or_path"] is None
    assert written["target_modules"] == ["k_proj"]
    assert written["rank_pattern"] == written["alpha_pattern"] == {}


def test_an_uploaded_configuration_is_written_as_it_came():
    original = {"peft_type": "LORA", "r": 2, "from_the_future": [1]}
    written = encode_config(made({"q_proj": (2, 8.0, 4.0)}), original)
    assert written == original
    assert written is not original
