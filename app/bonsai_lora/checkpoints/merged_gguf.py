"""A merged model as one GGUF file, computed while it is read, also of a base that is split.

Changed tensors are dequantized, merged and written in a wider type; all others stay as they are.
Of a Hadamard-folded base, every folded tensor is unfolded and widened, and the keys that say so are
dropped. Only PrismML's fork follows these keys; llama.cpp itself ignores them and computes nonsense
from folded tensors (github.com/av/harbor/wiki, Backend PrismML llama.cpp), so that a file which is
still folded in part could not be read by both.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from bonsai_lora.checkpoints.gguf_base import GgufBase
from bonsai_lora.checkpoints.gguf_tensor import Conversion, InGgufOrder, Stacked
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.parts import (
    MergedFile,
    Part,
    Stored,
    Values,
    computed_as,
    etag_of,
    gguf_parts,
)
from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats import gguf_writer, hadamard
from bonsai_lora.formats.dequantize import can_dequantize
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_names import GGUF_EMBEDDING, GGUF_HEAD, HEAD, Change
from bonsai_lora.formats.gguf_types import BY_NAME, FILE_TYPES, TensorType
from bonsai_lora.formats.gguf_writer import Layout, Plan, Writable

_FLOATS = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
_DROPPED = (hadamard.PREFIX, "split.")
_FILE_TYPE = "general.file_type"
_TYPES_VERSION = "general.quantization_version"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the merged file."""

    stored: str
    """The tensor of the base that it is made of."""
    info: TensorInfo
    """That of the base's tensor."""
    held: Sequence[tuple[str, Change]]
    """The tensors of a checkpoint that it holds."""
    is_merged: bool
    """Whether its values are not simply those of the base's tensor."""


def merged_gguf(model: MergedModel, base: GgufBase, dtype: str, *, is_widened: bool) -> MergedFile:
    """Return the GGUF file of a merged model, with changed tensors in `dtype`.

    With `is_widened`, all other quantized tensors are written in this dtype, too. Raises
    UnsupportedGgufError for a tensor that cannot be dequantized.
    """
    tensors = dict(_tensors(model, base))
    changed = {
        name for name, one in tensors.items() if _must_change(base, one, is_widened=is_widened)
    }
    layout = {
        name: (_type_for(one, dtype) if name in changed else one.info.type, one.info.shape)
        for name, one in tensors.items()
    }
    planned = _plan(base, layout)

    def part_of(name: str, info: TensorInfo) -> Part:
        one = tensors[name]
        if name in changed:
            return computed_as(info.type.name, _values(model, base, one))
        return Stored(base.holders[one.stored], one.info.start, one.info.stop)

    parts = gguf_parts(planned, lambda: _plan(base, layout).head, part_of)
    etag = etag_of(f"{model.digest}/gguf/{dtype}/{is_widened}")
    return MergedFile(parts, etag, "application/octet-stream")


def _tensors(model: MergedModel, base: GgufBase) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors of the merged file by name; an untied head follows the embedding."""
    is_grouped = base.folding is not None and base.folding.is_grouped
    for name, info in base.header.tensors.items():
        held = [(theirs, place.change) for theirs, place in base.places_in(name)]
        is_merged = any(
            theirs in model.changes or (is_grouped and change is Change.V_COLUMNS)
            for theirs, change in held
        )
        yield name, _Tensor(name, info, held, is_merged)
        if name == GGUF_EMBEDDING and model.is_untied:
            yield GGUF_HEAD, _Tensor(name, info, [(HEAD, Change.NONE)], HEAD in model.changes)


def _must_change(base: GgufBase, tensor: _Tensor, *, is_widened: bool) -> bool:
    kind = tensor.info.type
    must = (
        tensor.is_merged
        or base.folding_of(tensor.stored) is not None
        or (is_widened and kind.name not in _FLOATS)
    )
    if must and not can_dequantize(kind):
        raise UnsupportedGgufError(
            f"tensor {tensor.stored!r} of base {base.name!r} has type {kind.name}, which cannot be "
            "dequantized; use a file of a different type",
            tensor=tensor.stored,
            got=kind.name,
        )
    return must


def _type_for(tensor: _Tensor, dtype: str) -> TensorType:
    """Return the type of a changed tensor: llama.cpp needs vectors and convolutions as F32."""
    is_convolution = any(change is Change.CONVOLUTION for _, change in tensor.held)
    if len(tensor.info.shape) < 2 or is_convolution:
        return BY_NAME["F32"]
    kind = BY_NAME[dtype]
    return kind if tensor.info.width % kind.block == 0 else BY_NAME["F16"]


def _values(model: MergedModel, base: GgufBase, tensor: _Tensor) -> Values:
    """Return the values of a changed tensor, in the order of the file."""
    if not tensor.is_merged:
        return base.stored(tensor.stored)
    return Stacked(
        [
            InGgufOrder(
                model.values(theirs), Conversion(change, base.heads), base.info(theirs).shape
            )
            for theirs, change in tensor.held
        ]
    )


def _plan(base: GgufBase, layout: Layout) -> Plan:
    pairs: dict[str, Writable] = {}
    for key, value in base.header.pairs.items():
        if not key.startswith(_DROPPED):
            pairs[key] = gguf_writer.encoded_value(base.file.read_at, value)
    pairs |= _quantization(layout)
    if BY_NAME["TQ2_0_G128"] not in {kind for kind, _ in layout.values()}:
        pairs[_TYPES_VERSION] = np.uint32(2)
    return gguf_writer.plan(pairs, layout)


def _quantization(layout: Layout) -> Mapping[str, Writable]:
    """Return the type that most values have, as general.file_type."""
    counts: Counter[str] = Counter()
    for kind, shape in layout.values():
        counts[kind.name.removesuffix("_G128")] += prod(shape)
    known = [name for name, _ in counts.most_common() if name in FILE_TYPES]
    return {_FILE_TYPE: np.uint32(FILE_TYPES[known[0]])} if known else {}
