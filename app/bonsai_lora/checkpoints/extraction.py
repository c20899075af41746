"""What a fine-tuned checkpoint changed, tensor by tensor, in the forms that PEFT has."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from bonsai_lora.checkpoints.base import Base, Tensor
from bonsai_lora.checkpoints.difference import Difference, Survey
from bonsai_lora.checkpoints.orientation import CONV1D_TYPES, is_conv1d_name
from bonsai_lora.checkpoints.ties import is_embedding
from bonsai_lora.core.adapter import LayerKind, LoraAdapter
from bonsai_lora.core.cast import FLOAT32, Array
from bonsai_lora.core.combine import Loss
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.factors import Factors
from bonsai_lora.core.lowrank import Approximation, approximate, columns_for
from bonsai_lora.errors import InvalidRequestError, ShapeMismatchError
from bonsai_lora.formats.dtypes import FLOAT_DTYPES
from bonsai_lora.formats.gguf_names import EMBEDDING, HEAD
from bonsai_lora.formats.peft_keys import TOKEN_ROWS

Kind = Literal["lora", "token_rows", "replaced", "left_out"]

_FEW_ROWS = 0.01
"""Share of an embedding's rows up to which changed ones are kept as rows, which is exact."""
_COPIES = 8
"""Copies of the range finder's columns, as float64, that an approximation holds at most."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of each difference an extraction keeps."""

    rank: int
    """The rank, or with `energy` the highest."""
    energy: float | None = None
    """Share in (0, 1] of the squared norm of each module's difference."""


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """A tensor of both checkpoints."""

    name: str
    base: Tensor
    tuned: Tensor

    @property
    def module(self) -> str:
        """The name without `.weight` or `.bias`."""
        return self.name.removesuffix(".weight").removesuffix(".bias")

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.base.shape)


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """What became of a tensor; squares of Frobenius norms."""

    pair: Pair
    square: float
    """Of the difference."""
    base_square: float
    kind: Kind
    lost_square: float = 0.0
    """Of what the form leaves out."""
    adapter: LoraAdapter | None = None
    replacement: Array | None = None
    rows: npt.NDArray[np.intp] | None = None
    """Numbers of the changed rows, whose new values are the replacement."""

    @property
    def loss(self) -> Loss:
        """What the form leaves out of the difference."""
        return Loss(self.square, self.lost_square, self.lost_square)

    @property
    def parameter(self) -> str:
        """The name under which a set keeps the replacement."""
        return f"{self.pair.module}{TOKEN_ROWS}" if self.rows is not None else self.pair.name

    @property
    def size_bytes(self) -> int:
        """Memory that the result takes."""
        stored = 0 if self.replacement is None else self.replacement.nbytes
        return stored + (0 if self.adapter is None else self.adapter.memory_bytes())


def pairs_of(base: Base, tuned: Base, modules: Sequence[str]) -> list[Pair]:
    """Return the float tensors of both checkpoints, or those of some `modules` only.

    A head that both share with the embedding is left out. Raises InvalidRequestError if one has
    tensors that the other lacks, ShapeMismatchError if shapes differ.
    """
    names = dict.fromkeys([*base.tensor_names, *tuned.tensor_names])
    if base.is_tied and tuned.is_tied:
        names.pop(HEAD, None)
    meant = [name for name in names if _is_meant(name, modules)]
    sources = {name: (_source(base, name), _source(tuned, name)) for name in meant}
    lost = [name for name, found in sources.items() if None in found]
    if lost:
        raise InvalidRequestError(
            f"{len(lost)} tensors are in only one of {base.name!r} and {tuned.name!r}: "
            f"{', '.join(lost[:8])}; use the base that the model was tuned from",
            tensors=lost[:64],
        )
    if not meant:
        raise InvalidRequestError(
            f"base {base.name!r} has no module {modules[0]!r}; name modules by their full path or "
            "its end, such as q_proj",
            field="modules",
        )
    return [pair for name in meant if (pair := _pair(base, tuned, name, sources[name])) is not None]


def _is_meant(name: str, modules: Sequence[str]) -> bool:
    module = name.rpartition(".")[0]
    return not modules or any(module == one or module.endswith(f".{one}") for one in modules)


def _source(base: Base, name: str) -> str | None:
    """Return the tensor that has the values of `name`: a tied head is the embedding."""
    if name == HEAD and base.is_tied:
        name = EMBEDDING
    return name if name in base.tensor_names else None


def _pair(
    base: Base, tuned: Base, name: str, sources: tuple[str | None, str | None]
) -> Pair | None:
    found = []
    for one, source in zip((base, tuned), sources, strict=True):
        assert source is not None
        if one.info(source).dtype not in FLOAT_DTYPES:
            return None
        found.append(one.tensor(source))
    expected, got = (list(one.shape) for one in found)
    if got != expected:
        raise ShapeMismatchError(
            f"tensor {name!r} has shape {got} in {tuned.name!r}, but {expected} in {base.name!r}; "
            "resize the embeddings of the base first, or use the base that the model was tuned "
            "from",
            tensor=name,
            got=got,
            expected=expected,
        )
    return Pair(name, *found)


def work_bytes(pair: Pair, size: Size) -> int:
    """Return the most memory that `extract` takes for a tensor."""
    difference = Difference(pair.base, pair.tuned, lambda: None)
    rows, columns = difference.shape
    width = columns_for(size.rank, rows, columns)
    return difference.work_bytes + 8 * _COPIES * width * (rows + columns + width)


def extract(
    base: Base,
    pair: Pair,
    size: Size,
    check: Callable[[], None],
    reserve: Callable[[int], None],
) -> Change | None:
    """Return what became of a tensor; None if it is the same in both.

    `check` is called before each block and may raise, `reserve` before memory is taken that the
    result keeps. Raises InvalidRequestError for NaN and infinity.
    """
    difference = Difference(pair.base, pair.tuned, check)
    with np.errstate(invalid="ignore", over="ignore"):
        survey = difference.survey()
    if not math.isfinite(survey.square):
        raise InvalidRequestError(
            f"tensor {pair.name!r} has NaN, infinity or a difference beyond float32; check the "
            "training run",
            tensor=pair.name,
        )
    if survey.square == 0:
        return None
    change = _form_of(base, pair, difference, survey, size, reserve)
    if change.rows is None:
        reserve(change.size_bytes)
    return change


def _form_of(
    base: Base,
    pair: Pair,
    difference: Difference,
    survey: Survey,
    size: Size,
    reserve: Callable[[int], None],
) -> Change:
    change = partial(Change, pair, survey.square, survey.base_square)
    shape, changed = pair.base.shape, survey.changed_rows
    if not pair.name.endswith((".weight", ".bias")) or len(shape) > 2:
        return change("left_out", lost_square=survey.square)
    if len(shape) == 2:
        if is_embedding(pair.name) and (base.is_tied or len(changed) <= _FEW_ROWS * shape[0]):
            reserve(4 * len(changed) * shape[1])
            values = _storable(difference.tuned_rows(changed))
            return change("token_rows", replacement=values, rows=changed)
        found = _low_rank(pair.name, difference, size)
        if found is not None:
            return change("lora", found.lost_square, _adapter(base, pair, found.factors))
    rows = difference.tuned_rows(np.arange(difference.shape[0]))
    return change("replaced", replacement=_storable(rows.reshape(shape)))


def _low_rank(name: str, difference: Difference, size: Size) -> Approximation | None:
    """Return the approximation of a difference; None if it would not be smaller."""
    rows, columns = difference.shape
    rank = min(size.rank, rows, columns)
    if size.energy is None and rank * (rows + columns) >= rows * columns:
        return None
    found = approximate(difference.blocks, difference.shape, name, rank, size.energy)
    return found if found.rank * (rows + columns) < rows * columns else None


def _adapter(base: Base, pair: Pair, factors: Factors) -> LoraAdapter:
    """Return the adapter of a delta left @ right, which has scaling 1."""
    rank = len(factors.right)
    config = LoraConfig(rank, float(rank), 0.0, ())
    left, right = factors.left.astype(np.float32), factors.right.astype(np.float32)
    is_rows = is_embedding(pair.name)
    if is_rows or _is_conv1d(base, pair):  # weights (in, out): A and B are exchanged
        left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
    layer: LayerKind = "embedding" if is_rows else "linear"
    return LoraAdapter(config, right, left, config.scaling, layer=layer)


def _is_conv1d(base: Base, pair: Pair) -> bool:
    return base.model_type in CONV1D_TYPES and is_conv1d_name(pair.module)


def is_transposed(base: Base, changes: Sequence[Change]) -> bool:
    """Return whether adapters are for weights that are stored as (in, out): fan_in_fan_out."""
    return any(one.adapter is not None and _is_conv1d(base, one.pair) for one in changes)


def _storable(values: Array) -> Array:
    return values.astype(FLOAT32) if values.dtype == np.float64 else values


def adapters_of(changes: Sequence[Change]) -> Mapping[str, LoraAdapter]:
    """Return the adapters by module."""
    return {one.pair.module: one.adapter for one in changes if one.adapter is not None}


def replacements_of(changes: Sequence[Change]) -> Mapping[str, Array]:
    """Return the replaced parameters and token rows by name."""
    return {one.parameter: one.replacement for one in changes if one.replacement is not None}
