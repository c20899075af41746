"""Size and shape of delta W = scaling * B @ A from r x r factors, never from the product."""

from weakref import WeakKeyDictionary

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.factors import Values, doubles, triangle

_CANCELLED = 1e-5
_known: WeakKeyDictionary[LoraAdapter, Values] = WeakKeyDictionary()


def singular_values(adapter: LoraAdapter) -> Values:
    """Return the r singular values of scaling * B @ A, largest first, as float64.

    Of fused experts all of them: those of the block-diagonal matrix of their deltas.

    B = Q R and A^T = P S give B @ A = Q (R S^T) P^T, so they are those of the r x r matrix R S^T.
    Unlike eigenvalues of Gram matrices, nothing is squared, so small values keep their digits.
    Costs O(r^2 (d_in + d_out)) once; an adapter's values are remembered as long as it lives.
    """
    values = _known.get(adapter)
    if values is None:
        values = _known[adapter] = _compute(adapter)
    return values


def _compute(adapter: LoraAdapter) -> Values:
    values = np.zeros(len(adapter.a_matrix))
    if 0 in (adapter.rank, adapter.d_in, adapter.d_out):
        return values
    a_matrix, b_matrix = _doubles(adapter)
    core = triangle(b_matrix) @ triangle(a_matrix.swapaxes(-1, -2)).swapaxes(-1, -2)  # (…, r, r)
    found = np.linalg.svd(core, compute_uv=False).reshape(-1)
    values[: len(found)] = abs(adapter.scaling) * np.sort(found)[::-1]
    return values


def delta_norm(adapter: LoraAdapter) -> float:
    """Return the Frobenius norm of scaling * B @ A, to at least ten digits.

    Its square is the sum of (B^T B) * (A A^T), two r x r Gram matrices. Where that sum nearly
    cancels, so that digits are lost, the singular values give it.
    """
    a_matrix, b_matrix = _doubles(adapter)
    gram_a = a_matrix @ a_matrix.swapaxes(-1, -2)  # (…, r, r)
    gram_b = b_matrix.swapaxes(-1, -2) @ b_matrix
    square = float(np.sum(gram_a * gram_b))
    traces = np.trace(gram_a, axis1=-2, axis2=-1) * np.trace(gram_b, axis1=-2, axis2=-1)
    if square <= _CANCELLED * float(np.sum(traces)):
        return float(np.linalg.norm(singular_values(adapter)))
    return abs(adapter.scaling) * float(np.sqrt(square))


def _doubles(adapter: LoraAdapter) -> tuple[Values, Values]:
    """Return A (r, d_in) and B (d_out, r) as float64; of fused experts one each."""
    a_matrix, b_matrix = doubles(adapter.a_matrix), doubles(adapter.b_matrix)
    if adapter.experts is None:
        return a_matrix, b_matrix
    columns = b_matrix.reshape(-1, adapter.rank, adapter.experts)
    return a_matrix.reshape(adapter.experts, adapter.rank, -1), columns.transpose(2, 0, 1)


def effective_rank(adapter: LoraAdapter) -> float:
    """Return exp of the entropy of the normalized singular values; 0.0 where the delta is zero.

    Roy and Vetterli 2007, "The effective rank", equation 4: between 1 and r otherwise.
    """
    values = singular_values(adapter)
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))
