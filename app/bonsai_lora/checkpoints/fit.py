"""Check that a set fits a base: shapes, dtypes, and sums that one tensor can hold."""

from bonsai_lora.checkpoints.base import Base
from bonsai_lora.checkpoints.merged_tensor import Touched
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import (
    InvalidRequestError,
    ShapeMismatchError,
    UnsupportedAdapterError,
    counted,
)
from bonsai_lora.formats.dtypes import FLOAT_DTYPES

Shape = tuple[int, ...]


def check_not_empty(lora_set: BonsaiLoraSet) -> None:
    """Raise InvalidRequestError if the set is empty."""
    if lora_set.registry.is_empty() and not lora_set.replacements:
        raise InvalidRequestError(
            f"set {lora_set.adapter_name!r} is empty, so the merge would change nothing; add "
            "adapters first",
            set=lora_set.adapter_name,
        )


def check_tensor(base: Base, name: str, touched: Touched, *, is_one_set: bool) -> None:
    """Raise unless the changes `touched` fit tensor `name`.

    `is_one_set` says that all changes come from one set. Raises UnsupportedAdapterError if the
    tensor is missing, has no float dtype or cannot hold the sum, ShapeMismatchError if its shape is
    different.
    """
    if name not in base.tensor_names and touched.biases:
        raise UnsupportedAdapterError(
            f"the set adds a bias (lora_bias), but base {base.name!r} has no tensor {name!r} that "
            "could hold it; apply the set instead of merging it",
            tensor=name,
            base=base.name,
        )
    if name not in base.tensor_names:
        raise UnsupportedAdapterError(
            f"base {base.name!r} has no tensor {name!r} to replace or add to; merge the set "
            "into the model that it was trained on, or upload the adapter without that tensor",
            tensor=name,
            base=base.name,
        )
    info = base.info(name)
    if info.dtype not in FLOAT_DTYPES:
        raise UnsupportedAdapterError(
            f"tensor {name!r} of base {base.name!r} is {info.dtype}, which cannot be merged into; "
            f"expected one of {', '.join(FLOAT_DTYPES)}",
            tensor=name,
            got=info.dtype,
        )
    for shape in _shapes_of(touched):
        if shape != info.shape:
            raise _another_shape(base, name, shape, info.shape)
    _check_rows(base, name, touched, info.shape)
    _check_dora(name, touched, is_one_set=is_one_set)


def _shapes_of(touched: Touched) -> list[Shape]:
    """Return the tensor shape that each change requires, except token rows."""
    shapes: list[Shape] = [
        (
            *((one.experts,) if one.experts is not None else ()),
            *((one.d_out, one.d_in) if one.layer == "linear" else (one.d_in, one.d_out)),
        )
        for one, _ in touched.deltas
    ]
    shapes += [(one.d_out,) for one, _ in touched.biases]
    if touched.replacement is not None:
        shapes.append(touched.replacement.shape)
    return shapes


def _another_shape(base: Base, name: str, got: Shape, expected: Shape) -> ShapeMismatchError:
    advice = "merge it into the model that it was trained on"
    if len(got) == len(expected) == 2 and got[1] == expected[1] and _is_vocabulary(name):
        advice = (
            f"the vocabulary was resized to {got[0]} before training: load the base, call "
            f"resize_token_embeddings({got[0]}), save it, and merge into that"
        )
    return ShapeMismatchError(
        f"tensor {name!r} of base {base.name!r} has shape {list(expected)}, but the set is for "
        f"{list(got)}; {advice}",
        tensor=name,
        got=list(got),
        expected=list(expected),
    )


def _is_vocabulary(name: str) -> bool:
    return any(word in name for word in ("embed", "head", "wte", "shared", "output"))


def _check_rows(base: Base, name: str, touched: Touched, shape: Shape) -> None:
    rows = touched.rows
    if rows is None:
        return
    if touched.deltas:
        raise UnsupportedAdapterError(
            f"rows of {name!r} are replaced (trainable_token_indices) and a delta is added to the "
            "same tensor; merge one of the two first",
            tensor=name,
        )
    if len(shape) != 2 or rows.values.shape[1] != shape[1]:
        raise _another_shape(base, name, rows.values.shape, shape)
    if rows.numbers.size and rows.numbers.max() >= shape[0]:
        raise ShapeMismatchError(
            f"the set replaces row {rows.numbers.max()} of {name!r} (trainable_token_indices), but "
            f"base {base.name!r} has {counted(shape[0], 'row')}; resize its embeddings first",
            tensor=name,
            got=int(rows.numbers.max()),
            expected=shape[0],
        )


def _check_dora(name: str, touched: Touched, *, is_one_set: bool) -> None:
    is_dora = any(one.magnitude is not None for one, _ in touched.deltas)
    is_alone = len(touched.deltas) == 1 and (touched.replacement is None or is_one_set)
    if is_dora and (not is_alone or touched.deltas[0][1] != 1.0):
        raise UnsupportedAdapterError(
            f"DoRA scales whole rows of {name!r}, so it cannot be weighted or combined with other "
            "sets; merge it alone with weight 1",
            tensor=name,
        )
