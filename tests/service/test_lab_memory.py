"""What a combination, a comparison or an extraction reserves covers what it takes at most."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from test_combine import random_adapter

from bonsai_lora.checkpoints import difference, extraction
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.core.combine import combine
from bonsai_lora.core.recipe import OPTIONS, Recipe
from bonsai_lora.core.similarity import similarity
from bonsai_lora.formats import safetensors
from bonsai_lora.service.combine import Plan
from bonsai_lora.service.compare import Comparison

UNTRACED = 1.0 if np.lib.NumpyVersion(np.__version__) >= "2.5.0" else 1.5
"""Before NumPy 2.5, LAPACK's copies of a matrix are not traced."""
SETS = [(2, 16, 400, 300, None), (24, 8, 200, 150, None), (2, 32, 150, 100, 8)]
"""Number of sets, rank, d_in, d_out, experts."""


def peak_of(work):
    """The most bytes that `work` holds at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


RECIPES = [
    Recipe(method, **size, **({"density": 0.5} if "density" in options else {}))
    for method, options in OPTIONS.items()
    for size in ({}, {"rank": 2}, {"energy": 1.0})
    if size.keys() <= set(options)
]
"""Every method, with each of the options that say how large the new set may be."""
each_recipe = pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda one: f"{one.method} {one.rank or one.energy or ''}"
)


@pytest.mark.parametrize("shape", SETS)
@each_recipe
def test_combinations(rng, recipe, shape):
    count, rank, d_in, d_out, experts = shape
    if recipe.method == "slerp" and count != 2:
        pytest.skip("slerp takes two sets")
    adapters = [
        random_adapter(rng, rank, d_in, d_out, dtype=ml_dtypes.bfloat16, experts=experts)
        for _ in range(count)
    ]
    weights = [1 / count] * count
    plan = Plan("new", [], weights, recipe, {"m": adapters}, adapters[0].rank)
    peak = peak_of(lambda: combine("m", adapters, weights, recipe, adapters[0].rank))
    assert peak <= plan.work_bytes() + plan.result_bytes()


@each_recipe
def test_each_expert_takes_as_much_as_a_matrix(rng, recipe):
    plain, *stacks = (
        Plan("new", [], [0.5, 0.5], recipe, {"m": [adapter, adapter]}, 2)
        for adapter in (
            random_adapter(rng, 2 * (count or 1), 40, 30, experts=count)
            for count in (None, 1, 2, 3)
        )
    )
    one, two, three = (plan.work_bytes() for plan in stacks)
    assert plain.work_bytes() == one
    assert two - one == three - two > 0
    assert [plan.result_bytes() / plain.result_bytes() for plan in stacks] == [1, 2, 3]


def test_knots_take_blocks_as_wide_as_the_stack_of_each_set_more(rng):
    adapters = [random_adapter(rng, 2, 40, 30) for _ in range(3)]
    knots, svd = (
        Plan("new", [], [1, 1, 1], recipe, {"m": adapters}, 2).work_bytes()
        for recipe in (Recipe("knots_ties", density=0.5), Recipe("svd", rank=6))
    )
    copies, float64_bytes, sets, stacked, d_in = 4, 8, 3, 6, 40
    assert knots - svd == copies * float64_bytes * sets * stacked * d_in


@each_recipe
def test_what_is_counted_for_a_new_set_covers_it(rng, recipe):
    ranks = (3, 3) if recipe.is_on_factors else (3, 2)
    pair = [random_adapter(rng, rank, 40, 30) for rank in ranks]
    plan = Plan("new", [], [0.5, 0.5], recipe, {"m": pair}, 3)
    made = combine("m", pair, [0.5, 0.5], recipe, 3).adapter
    made_bytes = made.a_matrix.nbytes + made.b_matrix.nbytes
    assert made_bytes <= plan.result_bytes()
    if recipe.method == "svd":  # its rank is known
        assert made_bytes == plan.result_bytes()


@pytest.mark.parametrize("shape", SETS)
def test_comparisons(rng, shape):
    count, rank, d_in, d_out, experts = shape
    adapters = [random_adapter(rng, rank, d_in, d_out, experts=experts) for _ in range(count)]
    comparison = Comparison([str(number) for number in range(count)], {"m": adapters})
    assert peak_of(lambda: similarity(adapters)) <= comparison.work_bytes() + 10_000


@pytest.mark.parametrize(
    ("shape", "rank"), [((200, 1500), 32), ((1500, 200), 32), ((400, 400), 190)]
)
def test_extractions(rng, monkeypatch, tmp_path, shape, rank):
    monkeypatch.setattr(difference, "_BLOCK_VALUES", 1 << 10)  # else the blocks take most
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        weights = {"q_proj.weight": rng.standard_normal(shape).astype(np.float32)}
        (tmp_path / name / "model.safetensors").write_bytes(safetensors.encode(weights))
    base, tuned = (BaseFolder(tmp_path).get(name) for name in ("base", "tuned"))
    (pair,) = extraction.pairs_of(base, tuned, [])
    size, kept = extraction.Size(rank), []
    peak = peak_of(lambda: extraction.extract(base, pair, size, lambda: None, kept.append))
    assert sum(kept) <= UNTRACED * peak <= extraction.work_bytes(pair, size) + sum(kept)
