"""One LoRA adapter: the two thin matrices beside one weight matrix (Hu et al. 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Literal

import numpy as np

from bonsai_lora.core import backend
from bonsai_lora.core.cast import FLOAT32, Array, Floats, to_float32
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.kaiming import kaiming_uniform
from bonsai_lora.core.merge import blocks, merge_rows
from bonsai_lora.errors import ShapeMismatchError, UnsupportedAdapterError

LayerKind = Literal["linear", "embedding", "conv1d", "exchanged"]
"""linear: the base weight is (d_out, d_in); embedding, conv1d: it is stored (d_in, d_out).

exchanged: fused experts, stored (E, d_in, d_out), whose A is (E * r, d_out) and B (d_in, r * E), as
peft 0.19 and later save them for classes that it does not know to store them so (Llama 4).
"""

Factors = tuple[Array, Array]
"""A and B."""


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A (r, d_in) and B (d_out, r) with the factor in `delta W = scaling * B @ A`; immutable.

    The arrays keep their dtype (float32, float16 or bfloat16) and are often views of a file;
    arithmetic is float32. Raises ShapeMismatchError if the shapes do not fit together.
    """

    config: LoraConfig
    a_matrix: Array
    """A, shape (rank, d_in)."""
    b_matrix: Array
    """B, shape (d_out, rank)."""
    scaling: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA; 0.0 for rank 0; a float32 value."""
    bias: Array | None = None
    """b of a lora_B with bias, shape (d_out,): the branch is scaling * (B A x + b)."""
    magnitude: Array | None = None
    """m of DoRA (Liu et al. 2024), shape (d_out,): W' = m / |W + scaling B A|, row by row."""
    layer: LayerKind = "linear"
    experts: int | None = None
    """E for the fused experts of an MoE layer: A is (E * rank, d_in), expert e's rows together, and
    B (d_out, rank * E), with column q * E + e for expert e (as peft 0.21 lays them out)."""

    def __post_init__(self) -> None:
        """Check the shapes: the kernels read as much memory as they say."""
        check_factors(self.a_matrix, self.b_matrix)
        for name, vector in (("bias", self.bias), ("magnitude", self.magnitude)):
            if vector is not None and vector.shape != (self.d_out,):
                raise ShapeMismatchError(
                    f"the {name} has shape {list(vector.shape)}; expected [{self.d_out}], as "
                    "lora_B has it",
                    got=list(vector.shape),
                    expected=[self.d_out],
                )

    @classmethod
    def new(cls, d_in: int, d_out: int, config: LoraConfig) -> "LoraAdapter":
        """Return the reference's start: A uniform in ±sqrt(2 / d_in), B zero."""
        a_matrix = kaiming_uniform(d_in, d_out, config.rank)
        # Broadcast, so that a new adapter takes no memory for its zeros.
        b_matrix = np.broadcast_to(np.float32(0), (d_out, config.rank))
        return cls(config, a_matrix, b_matrix, config.scaling)

    @cached_property
    def rank(self) -> int:
        """r, as the matrices have it; of each expert."""
        return int(self.a_matrix.shape[0]) // (self.experts or 1)

    @cached_property
    def d_in(self) -> int:
        """Width of the inputs."""
        return len(self.b_matrix) if self.layer == "exchanged" else int(self.a_matrix.shape[1])

    @cached_property
    def d_out(self) -> int:
        """Width of the outputs."""
        return int(self.a_matrix.shape[1]) if self.layer == "exchanged" else len(self.b_matrix)

    @cached_property
    def each_expert(self) -> "tuple[LoraAdapter, ...]":
        """One adapter per expert, as views; the adapter itself if it has no experts."""
        if self.experts is None:
            return (self,)
        rows = self.a_matrix.reshape(self.experts, self.rank, -1)
        columns = self.b_matrix.reshape(-1, self.rank, self.experts).transpose(2, 0, 1)
        if self.layer != "exchanged":
            pairs = zip(rows, columns, strict=True)
            return tuple(replace(self, a_matrix=a, b_matrix=b, experts=None) for a, b in pairs)
        return tuple(
            replace(self, a_matrix=b.T, b_matrix=a.T, layer="conv1d", experts=None)
            for a, b in zip(rows, columns, strict=True)
        )

    @cached_property
    def _product(self) -> backend.Apply:
        return backend.make_apply(self.a_matrix, self.b_matrix)

    def make_ready(self) -> None:
        """Prepare the product, which otherwise the first apply does."""
        self._product  # noqa: B018 - the property caches it

    @property
    def is_ready(self) -> bool:
        """Whether the product is prepared; if not, the first apply may read a file."""
        return "_product" in self.__dict__

    def stored_factors_of(self, rows: slice, columns: slice) -> tuple[Array, Floats]:
        """Return the right and left factors of a block of the delta, in the layout of the base."""
        if self.layer == "linear":
            return self.a_matrix[:, columns], to_float32(self.b_matrix[rows])
        # (B A)^T = A^T B^T
        return self.b_matrix[columns].T, to_float32(self.a_matrix[:, rows]).T

    def apply(self, x: Floats, weight: float | Floats = 1.0) -> Floats:
        """Return weight * scaling * ((x A^T) B^T + bias) as float32, (n, d_in) -> (n, d_out).

        One vector (d_in,) gives (d_out,). `weight` is for all rows, or one per row (n,). Costs
        2 n r (d_in + d_out) operations. Raises ShapeMismatchError for a different width, and
        UnsupportedAdapterError for DoRA, which needs `apply_dora`, and for fused experts, which are
        applied one by one (`each_expert`).
        """
        if self.magnitude is not None or self.experts is not None:
            kind, remedy = (
                ("DoRA", "apply_dora")
                if self.magnitude is not None
                else ("for fused experts", "one of each_expert")
            )
            raise UnsupportedAdapterError(f"this adapter is {kind}; use {remedy}")
        return self._apply(x, weight)

    def _apply(self, x: Floats, weight: float | Floats = 1.0) -> Floats:
        if x.ndim not in (1, 2) or x.shape[-1] != self.d_in:
            raise ShapeMismatchError(
                f"the input has shape {list(x.shape)}; expected [{self.d_in}] or "
                f"[rows, {self.d_in}]",
                got=list(x.shape),
                expected=[self.d_in] if x.ndim == 1 else ["rows", self.d_in],
            )
        factors = self._factors(weight)
        batch = x if x.ndim == 2 else x[None]
        if len(factors) not in (1, len(batch)):
            raise ValueError(
                f"expected one weight, or one for each of {len(batch)} rows; got {len(factors)}"
            )
        outputs = self._product(batch, factors)
        if self.bias is not None:
            outputs += factors[:, None] * to_float32(self.bias)
        return outputs if x.ndim == 2 else outputs[0]

    def _factors(self, weight: float | Floats) -> Floats:
        """Return scaling * weight as float32, (1,) or one per row (n,)."""
        if isinstance(weight, np.ndarray):
            return (self.scaling * weight).astype(FLOAT32)
        return self._factor if weight == 1.0 else np.array([self.scaling * weight], FLOAT32)

    @cached_property
    def _factor(self) -> Floats:
        return np.array([self.scaling], FLOAT32)

    def apply_dora(self, x: Floats, base_outputs: Floats, row_norms: Floats) -> Floats:
        """Return what a DoRA layer adds to `base_outputs` = W x (without bias), same shape.

        That is (m / norm - 1) * W x + (m / norm) * scaling * B A x, where `row_norms` (d_out,) are
        those of W + scaling * B @ A (peft 0.21, tuners/lora/dora.py).
        """
        assert self.magnitude is not None
        ratio = to_float32(self.magnitude) / row_norms
        return (ratio - 1) * base_outputs + ratio * self._apply(x)

    def param_count(self) -> int:
        """Return r * (d_in + d_out) per expert, plus d_out for each of bias and magnitude."""
        vectors = sum(one is not None for one in (self.bias, self.magnitude))
        per_expert = self.rank * (self.d_in + self.d_out)
        return per_expert * (self.experts or 1) + vectors * self.d_out

    def memory_bytes(self) -> int:
        """Return the size of all parameters as float32, in bytes."""
        return 4 * self.param_count()

    def merge_into_weights(self, weights: Array) -> None:
        """Add scaling * B @ A to `weights` (d_out, d_in) in place.

        `weights` is float32, float16 or bfloat16 and C-contiguous; the sum is computed in float32
        and rounded once, to nearest even. Raises ShapeMismatchError for a different shape,
        UnsupportedAdapterError for DoRA and fused experts.
        """
        if weights.shape != (self.d_out, self.d_in):
            raise ShapeMismatchError(
                f"the weights have shape {list(weights.shape)}; expected {[self.d_out, self.d_in]}",
                got=list(weights.shape),
                expected=[self.d_out, self.d_in],
            )
        if self.magnitude is not None or self.experts is not None:
            raise UnsupportedAdapterError(
                "DoRA and fused experts cannot be added to weights in place; merge the set into a "
                "base checkpoint"
            )
        if not weights.flags.c_contiguous or not weights.flags.writeable:
            raise ValueError("expected weights that are C-contiguous and may be written")
        b_matrix = to_float32(self.b_matrix)
        merge_rows(weights, self.a_matrix, b_matrix, self.scaling, out=weights)


def check_factors(a_matrix: Array, b_matrix: Array) -> None:
    """Raise ShapeMismatchError unless A is (r, d_in) and B is (d_out, r)."""
    if a_matrix.ndim != 2 or b_matrix.ndim != 2 or a_matrix.shape[0] != b_matrix.shape[1]:
        raise ShapeMismatchError(
            f"lora_A has shape {list(a_matrix.shape)} and lora_B {list(b_matrix.shape)}; "
            "expected (r, d_in) and (d_out, r) with the same r",
            got=[list(a_matrix.shape), list(b_matrix.shape)],
            expected=[["r", "d_in"], ["d_out", "r"]],
        )


def find_transposed(
    factors: Mapping[str, Factors], embeddings: Mapping[str, Factors]
) -> dict[str, str]:
    """Return the names whose A and B are those of an embedding transposed, with its name.

    The time is in proportion to their sizes: factors of equal shapes are compared by digest.
    """
    shapes = {(b.T.shape, a.T.shape) for a, b in embeddings.values() if a.ndim == b.ndim == 2}
    alike = {name: (a, b) for name, (a, b) in factors.items() if (a.shape, b.shape) in shapes}
    if not alike:
        return {}
    known = {
        _digest(b.T, a.T): name
        for name, (a, b) in embeddings.items()
        if (b.T.shape, a.T.shape) in shapes
    }
    found = {name: known.get(_digest(*one)) for name, one in alike.items()}
    return {name: embedding for name, embedding in found.items() if embedding is not None}


def _digest(*matrices: Array) -> bytes:
    digest = sha256()
    for matrix in matrices:
        digest.update(repr(matrix.shape).encode())
        for block in blocks(*matrix.shape):
            digest.update(matrix[block].tobytes())
    return digest.digest()
