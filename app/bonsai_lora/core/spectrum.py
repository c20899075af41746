"""Size and shape of delta W = scaling * B @ A from r x r factors, never from the product."""

from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import to_float32

Values = npt.NDArray[np.float64]

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
    if adapter.experts is not None:  # block by block: the values of all experts
        values = np.concatenate([_compute(one) for one in adapter.each_expert])
        return np.sort(values)[::-1]
    if adapter.rank == 0 or adapter.d_in == 0 or adapter.d_out == 0:
        return np.zeros(adapter.rank)
    a_matrix, b_matrix = _doubles(adapter)
    right: Values = np.linalg.qr(b_matrix, mode="r")  # type: ignore[assignment]  # of NumPy's stubs
    left: Values = np.linalg.qr(a_matrix.T, mode="r")  # type: ignore[assignment]
    core = right @ left.T  # (r, r)
    values = np.zeros(adapter.rank)
    found = np.linalg.svd(core, compute_uv=False)
    values[: len(found)] = abs(adapter.scaling) * found
    return values


def delta_norm(adapter: LoraAdapter) -> float:
    """Return the Frobenius norm of scaling * B @ A, to at least ten digits.

    Its square is the sum of (B^T B) * (A A^T), two r x r Gram matrices. Where that sum nearly
    cancels, so that digits are lost, the singular values give it.
    """
    if adapter.experts is not None:
        return float(np.linalg.norm([delta_norm(one) for one in adapter.each_expert]))
    a_matrix, b_matrix = _doubles(adapter)
    gram_a, gram_b = a_matrix @ a_matrix.T, b_matrix.T @ b_matrix  # (r, r)
    square = float(np.sum(gram_a * gram_b))
    if square <= _CANCELLED * float(np.trace(gram_a) * np.trace(gram_b)):
        return float(np.linalg.norm(singular_values(adapter)))
    return abs(adapter.scaling) * float(np.sqrt(square))


def _doubles(adapter: LoraAdapter) -> tuple[Values, Values]:
    """Return A and B as float64."""
    a_matrix, b_matrix = adapter.a_matrix, adapter.b_matrix
    return to_float32(a_matrix).astype(np.float64), to_float32(b_matrix).astype(np.float64)


def effective_rank(adapter: LoraAdapter) -> float:
    """Return exp of the entropy of the normalised singular values; 0.0 where the delta is zero.

    Roy and Vetterli 2007, "The effective rank", equation 4: between 1 and r otherwise.
    """
    values = singular_values(adapter)
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))
