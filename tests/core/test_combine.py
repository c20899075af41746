"""Combinations by factors, against dense float64 and values worked out by other programs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import delta_weight, relative_error

from bonsai_lora.core import combine as combining
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import BFLOAT16
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.recipe import OPTIONS, Recipe
from bonsai_lora.core.similarity import similarity
from bonsai_lora.core.spectrum import delta_norm, effective_rank, singular_values
from bonsai_lora.errors import InvalidRequestError, NonFiniteOutputError

# The case of two deltas of rank 1 that can be checked by hand.
A1, B1 = [[1.0, 0, 0]], [[1.0], [0]]
A2, B2 = [[1.0, 1, 0]], [[1.0], [1]]
D1, D2 = np.array([[1.0, 0, 0], [0, 0, 0]]), np.array([[1.0, 1, 0], [1, 1, 0]])

BY_FACTORS = ("exact", "cat", "svd", "slerp", "knots_ties", "tsv", "iso_c")
OPTIONS_OF = {"della": {"density": 0.5}, "breadcrumbs": {"density": 0.5}} | {
    method: {"density": 0.5}
    for method, options in OPTIONS.items()
    if "density" in options and method != "knots_ties"
}


def adapter(a, b, scaling=1.0, experts=None, dtype=np.float32):
    a, b = np.asarray(a, np.float32).astype(dtype), np.asarray(b, np.float32).astype(dtype)
    rank = len(a) // (experts or 1)
    return LoraAdapter(LoraConfig(rank, scaling * rank), a, b, scaling, experts=experts)


def random_adapter(rng, rank, d_in=7, d_out=5, scaling=1.0, **options):
    return adapter(
        rng.standard_normal((rank, d_in)), rng.standard_normal((d_out, rank)), scaling, **options
    )


def delta(one):
    """scaling * B @ A as float64; of fused experts (E, d_out, d_in)."""
    if one.experts is None:
        return delta_weight(one.a_matrix, one.b_matrix, one.scaling)
    return np.stack([delta(expert) for expert in one.each_expert])


def combined(adapters, weights, method, *, default_rank=99, **options):
    return combining.combine("m", adapters, weights, Recipe(method, **options), default_rank)


def by_hand(method, weights=(1.0, 1.0), **options):
    return combined([adapter(A1, B1), adapter(A2, B2)], weights, method, **options)


def test_worked_values():
    one, two = by_hand("exact"), by_hand("svd", rank=1)
    assert delta(one.adapter).tolist() == [[2, 1, 0], [1, 1, 0]]
    np.testing.assert_allclose(
        delta(two.adapter), [[1.894427, 1.170820, 0], [1.170820, 0.723607, 0]], atol=1e-6
    )
    assert two.loss.energy_kept == pytest.approx(0.979157, abs=1e-6)
    assert math.sqrt(two.loss.error_square) == pytest.approx(0.381966, abs=1e-6)
    linear = by_hand("linear")
    assert delta(linear.adapter).tolist() == [[4, 2, 0], [2, 1, 0]]
    assert linear.loss.relative_error == pytest.approx(math.sqrt(6 / 7))
    np.testing.assert_allclose(
        delta(by_hand("iso_c").adapter), [[1.5, 0, 0], [0, 1.5, 0]], atol=1e-6
    )
    np.testing.assert_allclose(
        delta(by_hand("tsv").adapter), [[1.146447, 0.353553, 0], [0.353553, 1.853553, 0]], atol=1e-6
    )
    np.testing.assert_allclose(
        delta(by_hand("knots_ties").adapter), [[1.242536, 1, 0], [0.189366, 1, 0]], atol=1e-6
    )
    np.testing.assert_allclose(
        delta(by_hand("slerp", weights=(0.7, 0.3)).adapter),
        0.772645 * D1 + 0.356822 * D2,
        atol=1e-6,
    )


def test_worked_figures():
    pair = adapter(A1, B1), adapter(A2, B2)
    found = similarity(pair)
    assert found.gram.tolist() == [[1, 1], [1, 4]]
    assert found.cosine[0, 1] == pytest.approx(0.5)
    difference = combined(pair, (1.0, -1.0), "exact").adapter
    assert delta_norm(difference) == pytest.approx(math.sqrt(3))
    total = by_hand("exact").adapter
    values = singular_values(total)
    np.testing.assert_allclose(values, [(3 + 5**0.5) / 2, (3 - 5**0.5) / 2], rtol=1e-6)
    assert np.sum(values**2) / values[0] ** 2 == pytest.approx(1.021286, abs=1e-6)
    assert effective_rank(total) == pytest.approx(1.464134, abs=1e-6)


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.floats(-4, 4), st.sampled_from([0.25, 2.0, math.sqrt(2)])),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_exact_is_the_weighted_sum(sets, d_in, d_out, seed):
    """Any ranks, weights, scalings and shapes, also ranks above the shape."""
    rng = np.random.default_rng(seed)
    adapters = [random_adapter(rng, rank, d_in, d_out, scaling) for rank, _, scaling in sets]
    weights = [weight for _, weight, _ in sets]
    expected = sum(weight * delta(one) for one, weight in zip(adapters, weights, strict=True))
    size = sum(
        abs(weight) * delta_weight(np.abs(one.a_matrix), np.abs(one.b_matrix), abs(one.scaling))
        for one, weight in zip(adapters, weights, strict=True)
    )
    for method in ("exact", "cat", "svd"):
        got = combined(adapters, weights, method)
        assert (np.abs(delta(got.adapter) - expected) <= 1e-6 * size.max() + 1e-30).all(), method
        assert got.loss.relative_error == 0 or got.loss.relative_error < 1e-7
        assert got.adapter.scaling == (1.0 if got.adapter.rank else 0.0)


def test_stacking_keeps_b_to_the_bit(rng):
    pair = [random_adapter(rng, 3), random_adapter(rng, 2, scaling=0.5)]
    got = combined(pair, [2.0, -1.0], "cat").adapter
    assert np.array_equal(got.b_matrix, np.hstack([one.b_matrix for one in pair]))
    assert np.array_equal(got.a_matrix, np.vstack([2 * pair[0].a_matrix, -0.5 * pair[1].a_matrix]))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_the_best_of_its_rank(rng, rank):
    pair = [random_adapter(rng, 4, 30, 20, 0.5), random_adapter(rng, 2, 30, 20, dtype=BFLOAT16)]
    total = 0.7 * delta(pair[0]) - 2 * delta(pair[1])
    u, values, vt = np.linalg.svd(total)
    best = (u[:, :rank] * values[:rank]) @ vt[:rank]
    got = combined(pair, [0.7, -2.0], "svd", rank=rank)
    assert got.adapter.rank == rank
    assert relative_error(delta(got.adapter), best) < 1e-6
    lost = np.sum(values[rank:] ** 2) / np.sum(values**2)
    assert got.loss.energy_kept == pytest.approx(1 - lost)
    assert got.loss.relative_error == pytest.approx(math.sqrt(lost))


def test_energy_chooses_the_rank(rng):
    one = random_adapter(rng, 6, 30, 20)
    values = np.linalg.svd(delta(one), compute_uv=False)[:6]
    shares = np.cumsum(values**2) / np.sum(values**2)
    for rank in range(1, 7):
        got = combined([one], [1.0], "svd", energy=shares[rank - 1] - 1e-9)
        assert got.adapter.rank == rank
        assert got.loss.energy_kept == pytest.approx(shares[rank - 1])
    assert combined([one], [1.0], "svd", energy=1.0).adapter.rank == 6


def test_linear_subtracts(rng):
    """One set, weight -0.5: no other set to cross with."""
    one = random_adapter(rng, 3, 30, 20, 0.25)
    got = combined([one], [-0.5], "linear")
    assert relative_error(delta(got.adapter), -0.5 * delta(one)) < 1e-6
    assert got.loss.relative_error == 0


def test_duplicates_and_cancelled_sums(rng):
    """The Gram matrix of the stacked factors is singular here."""
    one = random_adapter(rng, 3, 30, 20)
    nothing = combined([one, one], [1.0, -1.0], "svd", rank=3)
    assert np.abs(delta(nothing.adapter)).max() < 1e-6
    twice = combined([one, one], [0.5, 0.5], "svd", energy=0.999999)
    assert twice.adapter.rank == 3
    assert relative_error(delta(twice.adapter), delta(one)) < 1e-6
    for method in ("tsv", "iso_c", "knots_ties"):
        got = combined([one, one], [1.0, 1.0], method).adapter
        assert np.isfinite(delta(got)).all()
        assert np.linalg.norm(delta(got)) > 0.1


def dense_polar(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def dense_tsv(deltas, ranks):
    found = [np.linalg.svd(one, full_matrices=False) for one in deltas]
    u = np.hstack([one[0][:, :k] for one, k in zip(found, ranks, strict=True)])
    values = np.concatenate([one[1][:k] for one, k in zip(found, ranks, strict=True)])
    vt = np.vstack([one[2][:k] for one, k in zip(found, ranks, strict=True)])
    return (dense_polar(u) * values) @ dense_polar(vt)


def dense_iso(deltas, rank):
    u, values, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    return values[:rank].mean() * u[:, :rank] @ vt[:rank]


def dense_knots(deltas, rank, density):
    u, values, vt = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    parts = np.split(values[:rank, None] * vt[:rank], len(deltas), axis=1)
    for part in parts:
        least = np.sort(np.abs(part).ravel())[part.size - int(density * part.size)]
        part[np.abs(part) < least] = 0
    total = sum(parts)
    sign = np.where(total == 0, np.sign(np.sign(total).sum()), np.sign(total))
    agrees = [np.sign(part) == sign for part in parts]
    summed = sum(np.where(one, part, 0) for one, part in zip(agrees, parts, strict=True))
    return u[:, :rank] @ (summed / np.maximum(sum(one.astype(int) for one in agrees), 1))


def test_methods_in_singular_space_agree_with_dense_ones(rng):
    trio = [random_adapter(rng, rank, 40, 30, 0.5) for rank in (3, 2, 4)]
    weights = [1.0, 0.5, -0.7]
    deltas = [weight * delta(one) for one, weight in zip(trio, weights, strict=True)]
    for method, expected, options in (
        ("tsv", dense_tsv(deltas, (3, 2, 4)), {}),
        ("tsv", dense_tsv(deltas, (2, 2, 2)), {"rank": 6}),
        ("iso_c", dense_iso(deltas, 9), {}),
        ("knots_ties", dense_knots(deltas, 9, 1.0), {}),
        ("knots_ties", dense_knots(deltas, 9, 0.3), {"density": 0.3}),
    ):
        got = combined(trio, weights, method, **options).adapter
        assert relative_error(delta(got), expected) < 1e-5, method


def test_iso_c_is_cut_in_the_order_of_the_sum(rng):
    pair = [random_adapter(rng, 2, 40, 30), random_adapter(rng, 2, 40, 30)]
    u, values, vt = np.linalg.svd(delta(pair[0]) + delta(pair[1]))
    got = combined(pair, [1.0, 1.0], "iso_c", rank=1)
    expected = values[:4].mean() * np.outer(u[:, 0], vt[0])
    assert relative_error(delta(got.adapter), expected) < 1e-6
    assert got.loss.energy_kept == pytest.approx(0.25)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (3.0, 1.0)])
def test_slerp(rng, weights):
    pair = [random_adapter(rng, 3, 9, 8), random_adapter(rng, 2, 9, 8, 0.5)]
    first, second = map(delta, pair)
    t = weights[1] / sum(weights)
    angle = math.acos(np.vdot(first, second) / np.linalg.norm(first) / np.linalg.norm(second))
    expected = (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)
    got = combined(pair, weights, "slerp").adapter
    assert relative_error(delta(got), expected) < 1e-6
    alone = combined([pair[0], None], (1.0, 1.0), "slerp").adapter
    assert relative_error(delta(alone), math.sqrt(0.5) * first) < 1e-6
    same = combined([pair[0], pair[0]], (1.0, 2.0), "slerp").adapter
    assert relative_error(delta(same), first) < 1e-6


@pytest.mark.parametrize("method", OPTIONS)
def test_experts_are_combined_one_by_one(rng, method):
    pair = [random_adapter(rng, 6, 10, 8, 0.5, experts=3) for _ in range(2)]
    options = OPTIONS_OF.get(method, {})
    if method.startswith(("dare", "della")):
        options = {"density": 0.5}
    got = combined(pair, (0.7, -0.3) if method != "slerp" else (0.7, 0.3), method, **options)
    assert got.adapter.experts == 3
    assert got.adapter.a_matrix.shape == (3 * got.adapter.rank, 10)
    assert got.adapter.b_matrix.shape == (8, 3 * got.adapter.rank)
    if method.startswith(("dare", "della")):
        return  # each expert draws its own
    for expert in range(3):
        alone = combined(
            [one.each_expert[expert] for one in pair],
            (0.7, -0.3) if method != "slerp" else (0.7, 0.3),
            method,
            **options,
        )
        assert relative_error(delta(got.adapter.each_expert[expert]), delta(alone.adapter)) < 1e-5


def test_experts_share_the_rank_that_one_of_them_needs(rng):
    steep, flat = np.ones((2, 6)), rng.standard_normal((2, 6))  # of rank 1, and of rank 2
    one = adapter(np.vstack([steep, flat]), rng.standard_normal((5, 4)), experts=2)
    got = combined([one], [1.0], "svd", energy=0.9999)
    assert got.adapter.rank == 2
    assert relative_error(delta(got.adapter), delta(one)) < 1e-2


@pytest.mark.parametrize("method", OPTIONS)
def test_untrained_sets_make_an_untrained_set(method):
    """B is zero at the start; nothing divides by it."""
    pair = [LoraAdapter.new(6, 5, LoraConfig(2)) for _ in range(2)]
    got = combined(pair, (0.5, 0.5), method, default_rank=2, **OPTIONS_OF.get(method, {}))
    assert got.adapter.rank >= 1
    assert not delta(got.adapter).any()
    assert (got.loss.energy_kept, got.loss.relative_error) == (1.0, 0.0)


def test_a_set_that_lacks_the_module_counts_as_zero(rng):
    one = random_adapter(rng, 2)
    for method in ("exact", "svd", "linear", "ties_svd", "tsv"):
        options = {"density": 1.0} if method == "ties_svd" else {}
        got = combined([None, one], (3.0, 0.5), method, default_rank=2, **options).adapter
        assert relative_error(delta(got), 0.5 * delta(one)) < 1e-5, method


@pytest.mark.parametrize("method", OPTIONS)
def test_empty_matrices_and_ranks_above_the_shape(rng, method):
    options = [OPTIONS_OF.get(method, {})]
    options += [{**options[0], "energy": 0.9}] if "energy" in OPTIONS[method] else []
    options += [{**options[0], "rank": 2}] if "rank" in OPTIONS[method] else []
    for d_in, d_out, *ranks in itertools.product((0, 1, 3), (0, 1, 3), (0, 1, 4), (0, 1, 4)):
        if ranks[0] != ranks[1] and Recipe(method, **options[0]).is_on_factors:
            continue
        pair = [random_adapter(rng, rank, d_in, d_out) for rank in ranks]
        for one in options:
            got = combined(pair, (0.5, 0.5), method, default_rank=max(ranks), **one)
            assert delta(got.adapter).shape == (d_out, d_in)
            assert 0 <= got.loss.energy_kept <= 1 + 1e-9
            assert got.loss.relative_error >= 0


def test_overflow_is_refused(rng):
    one = random_adapter(rng, 2)
    for method in ("exact", "svd", "linear"):
        with pytest.raises(NonFiniteOutputError, match="module 'm' overflows"):
            combined([one, one], (1e100, 1e100), method)
    for method in ("svd", "ties_svd", "della", "knots_ties"):
        with pytest.raises(NonFiniteOutputError, match="module 'm' overflows"):
            combined([one, one], (1e300, 1e300), method, **OPTIONS_OF.get(method, {}))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("exact", {"rank": 4}, "rank is 4, but exact takes no options; remove it"),
        ("svd", {"density": 0.5}, "density is 0.5, but svd takes rank, energy; remove it"),
        ("svd", {"rank": 4, "energy": 0.9}, "energy is 0.9 beside a rank; send one of them"),
        ("svd", {"rank": 0}, "rank is 0; expected 1 or more"),
        ("svd", {"energy": 1.5}, "energy is 1.5; expected a number over 0"),
        ("ties", {}, "density is missing, which ties needs"),
        ("ties", {"density": 0.0}, "density is 0.0; expected a number over 0"),
        ("breadcrumbs", {"density": 0.5, "gamma": 1.0}, "gamma is 1.0"),
        (
            "della",
            {"density": 0.9},
            "epsilon is 0.15, so entries are kept with probabilities from 0.75 to 1.05",
        ),
    ],
)
def test_options_that_a_method_does_not_take(method, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        Recipe(method, **options)
