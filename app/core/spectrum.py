"""Size and shape of delta W = scaling * B @ A from r x r Gram matrices, never from the product."""

import numpy as np
import numpy.typing as npt

from app.core.adapter import LoraAdapter


def singular_values(adapter: LoraAdapter) -> npt.NDArray[np.float64]:
    """Return the r singular values of scaling * B @ A, largest first, as float64.

    They are the roots of the eigenvalues of (B^T B)^(1/2) (A A^T) (B^T B)^(1/2). Values below
    about 1e-8 of the largest are lost in rounding and come back as 0. Costs O(r^2 (d_in + d_out)).
    """
    a_matrix, b_matrix = (factor.astype(np.float64) for factor in adapter.factors)
    if adapter.rank == 0 or a_matrix.size == 0 or b_matrix.size == 0:
        return np.zeros(adapter.rank)
    eigenvalues, vectors = np.linalg.eigh(b_matrix.T @ b_matrix)
    root = vectors * np.sqrt(np.clip(eigenvalues, 0, None)) @ vectors.T
    squares = np.linalg.eigvalsh(root @ (a_matrix @ a_matrix.T) @ root)[::-1]
    squares = np.where(squares > squares[0] * 1e-15, squares, 0.0)
    values: npt.NDArray[np.float64] = abs(adapter.scaling) * np.sqrt(squares)
    return values


def delta_norm(adapter: LoraAdapter) -> float:
    """Return the Frobenius norm of scaling * B @ A."""
    return float(np.sqrt(np.sum(singular_values(adapter) ** 2)))


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
