"""Merge an adapter into weights, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bonsai_lora.checkpoints.orientation import is_conv1d_name, transposed
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.core.merge import Block, blocks, merge_rows
from bonsai_lora.errors import InvalidRequestError, ShapeMismatchError, UnsupportedAdapterError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.dtypes import FLOAT_DTYPES
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.service.adapters import get_adapter
from bonsai_lora.storage.setfile import StoredSet

MergeDtype = Literal["F32", "F16", "BF16"]
MERGE_DTYPES: tuple[str, ...] = get_args(MergeDtype)


@dataclass(frozen=True, slots=True)
class WeightMerge:
    """Computes W + scaling * B @ A for weights of one dtype.

    W has the layout of the base: (d_out, d_in), or (d_in, d_out) for embeddings and Conv1D.
    Raises InvalidRequestError for a dtype other than F32, F16, BF16, and UnsupportedAdapterError
    for an adapter that cannot be merged into weights alone.
    """

    adapter: LoraAdapter
    dtype: str
    unmerge: bool = False

    def __post_init__(self) -> None:
        """Check the dtype and the kind of adapter."""
        if self.dtype not in MERGE_DTYPES:
            raise InvalidRequestError(
                f"weights of dtype {self.dtype!r} cannot be merged; expected one of "
                f"{', '.join(MERGE_DTYPES)}",
                got=self.dtype,
                expected=list(MERGE_DTYPES),
            )
        if self.adapter.experts is not None:
            raise UnsupportedAdapterError(
                f"the module has {self.adapter.experts} fused experts, each with weights of its "
                "own; merge a base checkpoint, which holds them all",
                field="target_parameters",
            )
        if self.adapter.bias is not None:
            raise UnsupportedAdapterError(
                "the adapter has a bias (lora_bias), which weights alone cannot hold; use a merged "
                "checkpoint",
                field="lora_bias",
            )
        if self._is_dora and (self.unmerge or self._is_transposed):
            what, remedy = (
                ("unmerged", "keep the original weights")
                if self.unmerge
                else ("merged into transposed weights", "apply the set instead")
            )
            raise UnsupportedAdapterError(
                f"DoRA scales whole rows of the sum, so it cannot be {what}; {remedy}",
                field="use_dora",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of W."""
        shape = (self.adapter.d_out, self.adapter.d_in)
        return shape[::-1] if self._is_transposed else shape

    @property
    def total_bytes(self) -> int:
        """The length of W in bytes."""
        return self.shape[0] * self.shape[1] * int(FLOAT_DTYPES[self.dtype].itemsize)

    def blocks(self) -> Iterator[tuple[Block, int]]:
        """Yield the blocks of W in memory order, each with its length in bytes."""
        itemsize = FLOAT_DTYPES[self.dtype].itemsize
        for rows, columns in blocks(*self.shape, whole_rows=self._is_dora):
            size = (rows.stop - rows.start) * (columns.stop - columns.start) * itemsize
            yield (rows, columns), size

    def merge_block(self, block: Block, raw: bytearray) -> bytearray:
        """Merge the bytes `raw` of a block in place and return them."""
        rows, columns = block
        weights = np.frombuffer(raw, FLOAT_DTYPES[self.dtype]).reshape(
            rows.stop - rows.start, columns.stop - columns.start
        )
        self._merge_into(block, weights)
        return raw

    def merge_array(self, weights: Floats) -> Floats:
        """Return the merge of float32 `weights`; raises ShapeMismatchError."""
        self.check_shape(weights.shape)
        merged = np.array(weights, np.float32, order="C")
        for block, _ in self.blocks():
            self._merge_into(block, merged[block])
        return merged

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ShapeMismatchError unless `shape` is that of W."""
        if shape != self.shape:
            raise ShapeMismatchError(
                f"the weights have shape {list(shape)}; expected {list(self.shape)} for this "
                "module",
                got=list(shape),
                expected=list(self.shape),
            )

    @property
    def _is_dora(self) -> bool:
        return self.adapter.magnitude is not None

    @property
    def _is_transposed(self) -> bool:
        return self.adapter.layer != "linear"

    def _merge_into(self, block: Block, weights: Array) -> None:
        """Merge a block of W in place."""
        rows, _ = block
        scaling = -self.adapter.scaling if self.unmerge else self.adapter.scaling
        merge_rows(
            weights,
            *self.adapter.stored_factors_of(*block),
            scaling,
            out=weights,
            magnitude=None
            if self.adapter.magnitude is None
            else to_float32(self.adapter.magnitude[rows]),
        )


def stored_adapter(stored: StoredSet, module: str) -> LoraAdapter:
    """Return the adapter of `module` as its base stores the weight; raises AdapterNotFoundError.

    Of a set with fan_in_fan_out, layers that Conv1D models name so are (d_in, d_out).
    """
    adapter = get_adapter(stored, module)
    options = BaseOptions.of(stored.adapter_config)
    if options.is_transposed and adapter.layer == "linear" and is_conv1d_name(module):
        return transposed(adapter)
    return adapter


def merge_of_header(
    adapter: LoraAdapter, header: safetensors.Header, *, unmerge: bool
) -> WeightMerge:
    """Return the merge for a safetensors body with this header.

    Raises InvalidRequestError unless its only tensor is `weights`, ShapeMismatchError for a
    different shape.
    """
    if header.tensors.keys() != {"weights"}:
        raise InvalidRequestError(
            f"the body has the tensors {sorted(header.tensors)[:8]}; expected only 'weights'",
            got=sorted(header.tensors)[:8],
            expected=["weights"],
        )
    info = header.tensors["weights"]
    merge = WeightMerge(adapter, info.dtype, unmerge)
    merge.check_shape(info.shape)
    return merge
