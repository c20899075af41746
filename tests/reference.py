"""Slow, obvious, float64: the oracle for everything numeric."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Lora:
    """One adapter of any kind, as numbers."""

    a: np.ndarray
    """(r, d_in)"""
    b: np.ndarray
    """(d_out, r)"""
    scaling: float
    bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None
    is_embedding: bool = False
    """The base stores W as (d_in, d_out)."""

    def delta(self):
        """scaling * B @ A, as float64 (d_out, d_in)."""
        return delta_weight(self.a, self.b, self.scaling)

    def size(self):
        """|scaling| * |B| @ |A|: what rounding errors of the delta are measured by."""
        return delta_weight(np.abs(self.a), np.abs(self.b), abs(self.scaling))


def wide(array):
    """As float64, whatever it was."""
    return np.asarray(array).astype(np.float64)


def adds(lora, x, weight=1.0, weights=None):
    """What an adapter adds to the outputs of its layer for one row x: its equation in the paper.

    `weights` is W (d_out, d_in), for DoRA: its output is W' x with W' = m (W + D) / |W + D|.
    """
    if lora.magnitude is not None:
        assert weight == 1.0
        changed = wide(weights) + lora.delta()
        norms = np.array([np.sqrt((row * row).sum()) for row in changed])
        return (wide(lora.magnitude) / norms)[:, None] * changed @ wide(x) - wide(weights) @ wide(x)
    added = lora.delta() @ wide(x)
    if lora.bias is not None:
        added = added + lora.scaling * wide(lora.bias)
    return weight * added


def merged(weights, loras, replacement=None):
    """W as the base stores it, with every (lora, weight) merged in and nothing rounded."""
    total = wide(weights if replacement is None else replacement)
    for lora, weight in loras:
        delta = lora.delta().T if lora.is_embedding else lora.delta()
        total = total + weight * delta
        if lora.magnitude is not None:
            axis = 0 if lora.is_embedding else 1
            norms = np.sqrt((total * total).sum(axis=axis, keepdims=True))
            magnitude = wide(lora.magnitude)
            total = total * (magnitude[None] if lora.is_embedding else magnitude[:, None]) / norms
    return total


def merged_bias(bias, loras, replacement=None):
    """The bias of a layer, with that of every (lora, weight) added."""
    total = wide(bias if replacement is None else replacement)
    for lora, weight in loras:
        if lora.bias is not None:
            total = total + weight * lora.scaling * wide(lora.bias)
    return total
