"""Slow, obvious, float64: the oracle for everything numeric."""

import numpy as np

_MASK = (1 << 64) - 1


def xorshift64(seed, count):
    """The reference's generator, one step at a time in Python integers."""
    state, out = seed & _MASK, []
    for _ in range(count):
        state ^= (state << 13) & _MASK
        state ^= state >> 7
        state ^= (state << 17) & _MASK
        out.append(state)
    return out


def initial_a(d_in, d_out, rank):
    """The reference's A, element by element, in its order of float32 operations."""
    seed = (d_in * 6364136223846793005 + d_out + rank + 1) & _MASK
    bound = np.sqrt(np.float32(2) / np.float32(d_in)) if d_in else np.float32(0)
    values = [
        np.float32(np.float32(np.uint64(state)) / np.float32(2.0**64)) * np.float32(2) * bound
        - bound
        for state in xorshift64(seed, rank * d_in)
    ]
    return np.array(values, np.float32).reshape(rank, d_in)


def delta_weight(a_matrix, b_matrix, scaling):
    """scaling * B @ A as float64 (d_out, d_in)."""
    return float(scaling) * (b_matrix.astype(np.float64) @ a_matrix.astype(np.float64))


def apply(a_matrix, b_matrix, scaling, x):
    """What the adapter adds for rows x, as float64."""
    return x.astype(np.float64) @ delta_weight(a_matrix, b_matrix, scaling).T


def merge(weights, a_matrix, b_matrix, scaling):
    """W + scaling * B @ A in float64, not rounded."""
    return weights.astype(np.float64) + delta_weight(a_matrix, b_matrix, scaling)


def relative_error(got, expected):
    """Frobenius norm of the difference over that of the expected."""
    norm = np.linalg.norm(expected)
    return np.linalg.norm(got.astype(np.float64) - expected) / (norm or 1.0)
