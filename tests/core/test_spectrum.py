import numpy as np
import pytest
import reference
from test_adapter import random_adapter

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.spectrum import delta_norm, effective_rank, singular_values


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(5, 7, 3), (40, 30, 8), (3, 4, 6), (1, 1, 1)])
def test_against_the_svd_of_the_product(rng, d_in, d_out, rank):
    adapter = random_adapter(rng, d_in, d_out, rank)
    delta = reference.delta_weight(adapter.a_matrix, adapter.b_matrix, adapter.scaling)
    expected = np.zeros(rank)
    values = np.linalg.svd(delta, compute_uv=False)[:rank]
    expected[: len(values)] = values
    assert singular_values(adapter) == pytest.approx(expected, abs=1e-7 * expected[0])
    assert delta_norm(adapter) == pytest.approx(np.linalg.norm(delta), rel=1e-10)
    shares = expected[expected > 1e-7 * expected[0]] / expected.sum()
    assert effective_rank(adapter) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), 1e-5)


def test_values_that_nearly_cancel_keep_their_digits():
    """A's rows are almost equal and B takes their difference."""
    for a_matrix, b_matrix, norm in [
        ([[1, 0], [1, 1e-9]], [[1, -1]], 1e-9),
        ([[1, 0, 0], [1, 1e-8, 0], [0, 0, 1e-12]], [[1, -1, 0], [0, 0, 1]], 1e-8),
    ]:
        own = LoraConfig(rank=len(a_matrix), alpha=float(len(a_matrix)))
        factors = np.array(a_matrix, np.float32), np.array(b_matrix, np.float32)
        adapter = LoraAdapter(own, *factors, 1.0)
        assert delta_norm(adapter) == pytest.approx(norm, rel=1e-6)
        assert 1 <= effective_rank(adapter) < 1.01


def test_equal_singular_values_give_the_full_rank():
    own = LoraConfig(rank=4, alpha=4.0)
    adapter = LoraAdapter(own, np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), 1.0)
    assert effective_rank(adapter) == pytest.approx(4.0)
    assert delta_norm(adapter) == pytest.approx(2.0)


@pytest.mark.parametrize("adapter", [(8, 4, 2), (8, 4, 0), (0, 4, 2)])
def test_a_zero_delta_has_no_norm_and_no_rank(adapter):
    made = LoraAdapter.new(*adapter[:2], LoraConfig(rank=adapter[2]))
    assert delta_norm(made) == 0.0
    assert effective_rank(made) == 0.0
