"""Patterns against peft's own matching, and what they may cost."""

import random
import re
import time

import pytest

from bonsai_lora.errors import InvalidAdapterError
from bonsai_lora.formats.peft_patterns import Steps, choose

MODULES = [
    *(f"model.layers.{layer}.{name}" for layer in (0, 1, 10, 11, 21)
      for name in ("self_attn.q_proj", "self_attn.k-proj", "mlp.up_proj", "mlp.experts.1.up_proj")),
    "lm_head", "a.b", "xa.b", "a_b", "q_proj", "modelXlayers.1.q_proj",
]  # fmt: skip
ATOMS = [
    "q_proj", "up_proj", "layers.1", r"layers\.1", "mlp", ".", "a.b", r"a\.b", ".*", "^", "$", "|",
    "(", ")", "[0-9]", r"\d+", "1", r"k\-proj", "k-proj", "model", "lm_head", "?", "+", "{1,2}",
    "(?:", "(?=q)", "(?i:Q_PROJ)", r"\b", "^model.layers.1.self_attn.q_proj", "experts.1.up_proj",
]  # fmt: skip


def test_every_certain_answer_is_peft_s():
    """Random keys of names and syntax; peft's expression is that of its get_pattern_key."""
    draw = random.Random(5)
    compared = matched = 0
    for _ in range(20_000):
        key = "".join(draw.choice(ATOMS) for _ in range(draw.randint(1, 4)))
        try:
            theirs = re.compile(rf"(.*\.)?({key})$")
        except re.error:
            continue  # peft raises
        modules = draw.sample(MODULES, 3)
        for module, choice in choose("alpha_pattern", {key: 1}, modules, 0, Steps()).items():
            if not choice.uncertain:
                compared += 1
                matched += choice.value
                assert choice.value == bool(theirs.match(module)), (key, module)
    assert compared > 30_000
    assert matched > 1000


def test_the_first_key_wins_across_tables_and_expressions():
    patterns = {"up_proj": 1, ".*_proj": 2, "q_proj|k-proj": 3, "(?=x)lm_head": 4, "lm_head": 5}
    found = choose("alpha_pattern", patterns, MODULES, 0, Steps())
    assert found["model.layers.0.mlp.up_proj"].values() == (1,)
    assert found["model.layers.0.self_attn.q_proj"].values() == (2,)
    assert found["model.layers.0.self_attn.k-proj"].values() == (3,)
    assert found["lm_head"].values() == (4, 5)
    assert found["a.b"].values() == (4, 0)


def test_many_names_for_many_modules_cost_little():
    """As an adapter of every expert has them: two keys, and one key per module."""
    modules = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}"
        for layer in range(48)
        for expert in range(128)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    started = time.perf_counter()
    two = choose("rank_pattern", {"gate_proj": 4, r".*\.up_proj": 8}, modules, 16, Steps())
    each = choose("rank_pattern", dict.fromkeys(modules, 4), modules, 16, Steps())
    assert time.perf_counter() - started < 20  # 0.3 s here; only far off would be wrong
    assert {one.value for one in two.values()} == {4, 8, 16}
    assert {one.value for one in each.values()} == {4}


@pytest.mark.parametrize(
    "patterns",
    [
        {"(?:a|b)*a(?:a|b){900}" + "x" * number: 1 for number in range(400)},
        {f"(?:{number}|b)": 1 for number in range(20_000)},
        {"(" * 200_000: 1},
    ],
    ids=["large programs", "many programs", "long"],
)
def test_work_is_counted_before_it_is_done(patterns):
    modules = [f"layers.{number}." + "ab" * 100 for number in range(2000)]
    with pytest.raises(InvalidAdapterError) as first:
        choose("rank_pattern", patterns, modules, 0, Steps())
    with pytest.raises(InvalidAdapterError) as second:
        choose("rank_pattern", patterns, modules, 0, Steps())
    assert first.value.detail == second.value.detail


@pytest.mark.parametrize("key", ["(q_proj", "[a", "*", "a)"])
def test_broken_expressions_are_refused(key):
    with pytest.raises(InvalidAdapterError, match="not a valid regular expression"):
        choose("alpha_pattern", {key: 1}, ["q_proj"], 0, Steps())
