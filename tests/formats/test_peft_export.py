"""An adapter_config.json that is written here means, to peft's rules, what the set is."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.formats.peft import encode_config
from bonsai_lora.formats.peft_config import decode_config


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
    read = decode_config(json.dumps(written).encode())
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
@settings(deadline=None, max_examples=200)
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
def test_what_all_modules_share_is_said_once(rank, alpha):
    """An upload's scaling is kept in the shortest form of its float32, not in its binary one."""
    config = decode_config(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}).encode()
    )
    own = scaling(config.scalings(["q_proj"])["q_proj"])
    shared = (rank, alpha, own)
    found, written = meant({"q_proj": shared, "v_proj": shared}, rank=rank, alpha=alpha)
    assert written["alpha_pattern"] == written["rank_pattern"] == {}
    assert (written["r"], written["lora_alpha"]) == (rank, alpha)
    assert set(found.values()) == {(rank, own)}
