"""Approximations of matrices that come as row blocks, against the dense SVD."""

import numpy as np
import pytest

from bonsai_lora.core.lowrank import approximate

SHAPE = (90, 70)


def matrix_of(rng, values):
    """A matrix (90, 70) with these singular values."""
    u, v = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in SHAPE)
    return ((u * values) @ v.T).astype(np.float32)


def approximation(matrix, rank, energy=None):
    def blocks():
        yield from np.split(matrix, [7, 50])

    return approximate(blocks, matrix.shape, "key", rank, energy)


FEW = np.array([8.0, 4, 2, 1])
MANY = np.geomspace(8, 0.5, 60)


@pytest.mark.parametrize(("values", "rank"), [(FEW, 1), (FEW, 3), (FEW, 9), (MANY, 20)])
def test_the_best_of_a_rank(rng, values, rank):
    matrix = matrix_of(rng, values)
    found = approximation(matrix, rank)
    assert found.rank == min(rank, len(values))
    lost = np.linalg.norm(found.factors.left @ found.factors.right - matrix) ** 2
    assert found.lost_square == pytest.approx(lost, abs=1e-5)
    # Values that fall slowly are found within a few percent (Halko et al. 2011).
    assert lost == pytest.approx(np.sum(values[rank:] ** 2), rel=0.05, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "rank"),
    [*((FEW, rank) for rank in (1, 2, 3, 4)), *((MANY, rank) for rank in (1, 9, 40))],
)
def test_the_least_rank_that_keeps_an_energy(rng, values, rank):
    """Also one that needs more columns than it begins with."""
    squares = values**2
    energy = (np.sum(squares[:rank]) - squares[rank - 1] / 2) / np.sum(squares)
    matrix = matrix_of(rng, values)
    assert approximation(matrix, 64, energy).rank == rank
    assert approximation(matrix, rank, 1 - 1e-9).rank == rank, "it is a limit, too"


def test_nothing_is_approximated_by_rank_0():
    found = approximation(np.zeros(SHAPE, np.float32), 4, 0.5)
    assert (found.rank, found.lost_square) == (0, 0.0)
