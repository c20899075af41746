"""W + scaling * B @ A for a W that streams by, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from app.core.adapter import LoraAdapter
from app.core.cast import Floats
from app.core.merge import Block, blocks, merge_rows
from app.errors import InvalidRequestError, ShapeMismatchError
from app.formats import safetensors
from app.formats.dtypes import FLOAT_DTYPES

MERGE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class WeightMerge:
    """The merge of one adapter into weights of one dtype.

    Raises InvalidRequestError for a dtype other than F32, F16, BF16.
    """

    adapter: LoraAdapter
    dtype: str
    unmerge: bool = False

    def __post_init__(self) -> None:
        """Check the dtype."""
        if self.dtype not in MERGE_DTYPES:
            raise InvalidRequestError(
                f"weights of dtype {self.dtype!r} cannot be merged; "
                f"expected one of {', '.join(MERGE_DTYPES)}",
                got=self.dtype,
                expected=list(MERGE_DTYPES),
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of W."""
        return self.adapter.d_out, self.adapter.d_in

    @property
    def total_bytes(self) -> int:
        """Length of W in bytes."""
        return self.adapter.d_out * self.adapter.d_in * int(FLOAT_DTYPES[self.dtype].itemsize)

    def blocks(self) -> Iterator[tuple[Block, int]]:
        """Yield each block of W in the order of memory, with its length in bytes."""
        itemsize = FLOAT_DTYPES[self.dtype].itemsize
        for rows, columns in blocks(*self.shape):
            size = (rows.stop - rows.start) * (columns.stop - columns.start) * itemsize
            yield (rows, columns), size

    def merge_block(self, block: Block, raw: bytearray) -> bytearray:
        """Return the merged bytes of a block whose bytes are `raw`; `raw` itself, changed."""
        rows, columns = block
        weights = np.frombuffer(raw, FLOAT_DTYPES[self.dtype]).reshape(
            rows.stop - rows.start, columns.stop - columns.start
        )
        a_matrix, b_matrix = self.adapter.factors
        scaling = -self.adapter.scaling if self.unmerge else self.adapter.scaling
        merge_rows(weights, a_matrix[:, columns], b_matrix[rows], scaling, out=weights)
        return raw

    def merge_array(self, weights: Floats) -> Floats:
        """Return merged float32 weights (d_out, d_in); raises ShapeMismatchError."""
        self.check_shape(weights.shape)
        merged = np.array(weights, np.float32, order="C")
        a_matrix, b_matrix = self.adapter.factors
        scaling = -self.adapter.scaling if self.unmerge else self.adapter.scaling
        for rows, columns in blocks(*self.shape):
            block = merged[rows, columns]
            merge_rows(block, a_matrix[:, columns], b_matrix[rows], scaling, out=block)
        return merged

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ShapeMismatchError unless `shape` is that of W."""
        if shape != self.shape:
            raise ShapeMismatchError(
                f"the weights have shape {list(shape)}, but this module's are {list(self.shape)}",
                got=list(shape),
                expected=list(self.shape),
            )


def merge_of_header(
    adapter: LoraAdapter, header: safetensors.Header, *, unmerge: bool
) -> WeightMerge:
    """Return the merge for a safetensors body with this header.

    Raises InvalidRequestError unless it holds the one tensor `weights`, ShapeMismatchError for
    another shape.
    """
    if header.tensors.keys() != {"weights"}:
        raise InvalidRequestError(
            f"expected exactly one tensor named 'weights', got {sorted(header.tensors)[:8]}",
            got=sorted(header.tensors)[:8],
            expected=["weights"],
        )
    info = header.tensors["weights"]
    merge = WeightMerge(adapter, info.dtype, unmerge)
    merge.check_shape(info.shape)
    return merge
