"""Element-wise merging, against values that mergekit and peft 0.21.2 gave."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_combine import delta, random_adapter

from bonsai_lora.core import combine as combining
from bonsai_lora.core import combine_deltas, prune
from bonsai_lora.core.prune import merge_entries
from bonsai_lora.core.recipe import Recipe

X = np.array([[0.5, -2, 0.1, 1, -0.3, 3, -0.7, 0.2, 1.5, -0.05]], np.float32)
T1 = np.array([1, -2, 3, 0.5, -0.2, 0.1], np.float32)
T2 = np.array([2, 1, -1, 0.4, 0.3, -0.6], np.float32)
WEIGHTS = [1.0, 0.5]


def whole(array):
    return lambda: iter([array])


def rows(array, size):
    return lambda: (array[start : start + size] for start in range(0, len(array), size))


def test_magnitude():
    kept = prune.by_magnitude(whole(X), X.size, 0.4)()(X)
    np.testing.assert_allclose(kept, [[0, -2, 0, 1, 0, 3, 0, 0, 1.5, 0]])
    assert not prune.by_magnitude(whole(X), X.size, 0.05)()(X).any()
    assert np.array_equal(prune.by_magnitude(whole(X), X.size, 1.0)()(X), X)


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.4, 0.1, [0, -2, 0, 1, 0, 0, -0.7, 0, 1.5, 0]),
        (0.95, 0.1, [0.5, -2, 0.1, 1, -0.3, 0, -0.7, 0.2, 1.5, -0.05]),
        (0.4, 0.01, [0, -2, 0, 1, 0, 3, 0, 0, 1.5, 0]),  # no outlier, where mergekit drops all
    ],
)
def test_breadcrumbs(density, gamma, expected):
    kept = prune.without_outliers(whole(X), X.size, density, gamma)()(X)
    np.testing.assert_allclose(kept, [np.float32(expected)])


def merged(method, **options):
    recipe = Recipe(method, density=0.5, **options)
    kept = [prune.by_magnitude(whole(one), one.size, 0.5)()(one) for one in (T1, T2)]
    return merge_entries(kept, WEIGHTS, recipe).tolist()


def test_elections():
    assert merged("ties") == [1, -2, 3, 0, 0, 0]
    assert merged("ties", sign="frequency") == [1, 0.5, 3, 0, 0, 0]
    assert merged("magnitude_prune") == [2, -1.5, 2.5, 0, 0, 0]
    kept = [prune.by_magnitude(whole(one), one.size, 0.5)()(one) for one in (T1, T2)]
    np.testing.assert_allclose(
        prune.weighted_consensus(kept, WEIGHTS), [4 / 3, -2, 3, 0, 0, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        prune.weighted_sum([T1, T2], WEIGHTS), [2, -1.5, 2.5, 0.7, -0.05, -0.2], rtol=1e-6
    )


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60),
    st.integers(1, 7),
    st.data(),
)
def test_order_statistics_are_exact(values, size, data):
    array = np.array(values, np.float32)
    places = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    ordered = np.sort(np.abs(array))
    got = prune.order_statistics(rows(array[:, None], size), places)
    assert got == [float(ordered[place]) for place in places]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", ["random", "della"])
def test_draws_do_not_depend_on_the_blocks(rng, kind, size):
    array = rng.standard_normal((50, 21)).astype(np.float32)

    def start(blocks):
        if kind == "random":
            return prune.at_random("key", 0.3)
        return prune.by_rank_in_row("key", blocks, 0.3, 0.1)  # which draws in its first pass

    once = start(whole(array))()(array)
    sparsify = start(rows(array, size))()
    assert np.array_equal(np.vstack([sparsify(block) for block in rows(array, size)()]), once)
    assert 0.2 < (once != 0).mean() < 0.4


def test_random_entries_are_divided_by_their_probability(rng):
    array = rng.standard_normal((400, 300)).astype(np.float32)
    kept = prune.at_random("key", 0.25)()(array)
    is_kept = kept != 0
    assert is_kept.mean() == pytest.approx(0.25, abs=0.005)
    np.testing.assert_allclose(kept[is_kept], 4 * array[is_kept], rtol=1e-6)


def test_della_keeps_large_entries_more_often_and_the_sum_of_sizes(rng):
    array = rng.standard_normal((4000, 11)).astype(np.float32)
    kept = prune.by_rank_in_row("key", whole(array), 0.5, 0.2)()(array)
    assert np.abs(kept).sum() == pytest.approx(np.abs(array).sum(), rel=1e-4)
    ranks = np.argsort(np.argsort(np.abs(array), axis=1), axis=1)
    for rank in range(11):
        share = (kept[ranks == rank] != 0).mean()
        assert share == pytest.approx(0.3 + 0.4 * rank / 10, abs=0.03)


def test_draws_are_the_same_on_every_machine():
    """Known bits: the first numbers of this key."""
    got = prune.Draws("seed/module").uniform((4,))
    assert got.tolist() == [
        0.7294710089381259,
        0.5993444597759846,
        0.9949585235353802,
        0.8903192220185228,
    ]


def combined(adapters, weights, method, default_rank=8, **options):
    return combining.combine("m", adapters, weights, Recipe(method, **options), default_rank)


def dense(adapters, weights, method, density):
    """peft's definition on whole deltas, in float64; entries are trimmed by exact order."""
    kept = []
    for one in adapters:
        entries = delta(one)
        least = np.sort(np.abs(entries).ravel())[entries.size - int(density * entries.size)]
        kept.append(np.where(np.abs(entries) >= least, entries, 0))
    if method == "magnitude_prune_svd":
        return sum(weight * one for weight, one in zip(weights, kept, strict=True))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agrees = [np.sign(one) == sign for one in kept]
    total = sum(w * np.where(a, one, 0) for w, a, one in zip(weights, agrees, kept, strict=True))
    return total / np.maximum(sum(one.astype(int) for one in agrees), 1)


@pytest.mark.parametrize("method", ["ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_deltas_are_merged_and_cut(rng, monkeypatch, method, density):
    """In blocks of a few rows; error and energy are those of the whole matrix."""
    monkeypatch.setattr(combine_deltas, "_BLOCK_VALUES", 1200)
    pair = [random_adapter(rng, 3, 170, 150, 0.5), random_adapter(rng, 4, 170, 150)]
    weights = [0.8, -0.4]
    expected = dense(pair, weights, method, density)
    values = np.linalg.svd(expected, compute_uv=False)
    got = combined(pair, weights, method, density=density, rank=7)
    best = np.linalg.norm(values[7:])
    error = np.linalg.norm(delta(got.adapter) - expected)
    size = np.linalg.norm(expected)
    assert error <= best * 1.02 + 1e-5 * size
    assert got.loss.relative_error == pytest.approx(error / size, rel=1e-4, abs=1e-5)
    assert got.loss.energy_kept == pytest.approx(1 - (error / size) ** 2, abs=1e-5)


@pytest.mark.parametrize("method", ["dare_linear_svd", "dare_ties_svd", "breadcrumbs", "della"])
def test_the_seed_and_nothing_else_decides(rng, monkeypatch, method):
    pair = [random_adapter(rng, 3, 60, 50), random_adapter(rng, 3, 60, 50)]
    options = {"density": 0.5} | ({} if method == "breadcrumbs" else {"seed": 3})
    first = delta(combined(pair, [1.0, 1.0], method, **options).adapter)
    monkeypatch.setattr(combine_deltas, "_BLOCK_VALUES", 200)
    again = delta(combined(pair, [1.0, 1.0], method, **options).adapter)
    np.testing.assert_allclose(again, first, atol=1e-4)
    if "seed" in options:
        other = delta(combined(pair, [1.0, 1.0], method, density=0.5, seed=4).adapter)
        assert np.abs(other - first).max() > 0.1


def test_types_on_factors_draw_for_a_and_b(rng):
    pair = [random_adapter(rng, 4, 60, 50), random_adapter(rng, 4, 60, 50)]
    got = combined(pair, [1.0, 1.0], "dare_linear", density=0.5).adapter
    total = pair[0].a_matrix + pair[1].a_matrix
    assert 0.15 < (got.a_matrix == 0).mean() < 0.35
    assert not np.allclose(got.a_matrix, total)
    again = combined(pair, [1.0, 1.0], "dare_linear", density=0.5).adapter
    assert np.array_equal(got.a_matrix, again.a_matrix)
