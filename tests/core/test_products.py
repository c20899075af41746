"""Every form of the thin products gives the same numbers."""

import numpy as np
import pytest
import reference

from app.core import products
from app.core.adapter import LoraAdapter, sums_may_overflow
from app.core.config import LoraConfig
from app.core.products import Kernels

KINDS = [Kernels(has_small, threads) for has_small in (True, False) for threads in (1, 2)]
SHAPES = [(48, 32, 4), (4096, 512, 8), (3000, 4100, 17), (4096, 300, 64), (1, 1, 1), (7, 5, 0)]
ROWS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 100]


@pytest.fixture(params=KINDS, ids=str)
def kind(request, monkeypatch):
    """Each kind of kernels in turn, whatever this machine has."""
    monkeypatch.setattr(products, "kernels", lambda: request.param)
    return request.param


def adapter(d_in, d_out, rank, dtype=np.float32):
    rng = np.random.default_rng(rank)
    a_matrix = rng.standard_normal((rank, d_in)).astype(dtype)
    b_matrix = rng.standard_normal((d_out, rank)).astype(dtype)
    return LoraAdapter(LoraConfig(rank=rank), a_matrix, b_matrix, 1.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply_in_every_form(kind, shape):
    one = adapter(*shape)
    matrices = one.a_matrix.astype(np.float64), one.b_matrix.astype(np.float64)
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, shape[0])).astype(np.float32)
        got = one.apply(x)
        assert got.flags.c_contiguous
        expected = reference.apply(*matrices, 1.5, x)
        assert got.shape == expected.shape
        assert reference.relative_error(got, expected) < 2e-6, rows
    vector = one.apply(x[0])
    assert vector.shape == (shape[1],)
    assert reference.relative_error(vector, expected[0]) < 2e-6


def test_what_is_not_finite_shows_in_the_first_product(kind):
    """So nothing but that small product has to be looked at."""
    one = adapter(512, 8, 8)
    one.a_matrix[:, 100] = 0  # a zero does not hide it
    for rows in ROWS:
        for bad in (np.nan, np.inf, -np.inf):
            for place in (0, 100, 511):
                x = np.ones((rows, 512), np.float32)
                x[rows // 2, place] = bad
                with sums_may_overflow():
                    assert not np.isfinite(one.down(x, one.factors)[rows // 2]).any(), (
                        rows,
                        bad,
                        place,
                    )


@pytest.mark.parametrize(
    ("rows", "rank", "columns"), [(37, 16, 4096), (16, 8, 100), (3, 4, 9), (5, 0, 7), (40, 0, 7)]
)
def test_outer_products_in_every_form(kind, rows, rank, columns):
    rng = np.random.default_rng(rows)
    b_rows = rng.standard_normal((rows, rank)).astype(np.float32)
    a_columns = rng.standard_normal((rank, columns)).astype(np.float32)
    out = np.empty((rows, columns), np.float32)
    for one in (b_rows, np.asfortranarray(b_rows)):
        products.multiply_outer(one, a_columns, out)
        expected = b_rows.astype(np.float64) @ a_columns.astype(np.float64)
        assert np.abs(out - expected).max(initial=0) < 1e-5


def test_pieces_are_powers_of_two_that_are_small():
    for operations in (1, 60_000, 62_500, 62_501, 250_000, 1_000_000, 1_000_001, 10**9):
        piece = products._piece(operations)
        assert piece in (0, 1, 2, 4, 8, 16)
        assert piece * operations <= products.SMALL_OPERATIONS


def test_the_kernels_of_this_process_are_known():
    found = products.kernels()
    assert found.threads >= 1
    assert isinstance(found.has_small, bool)
