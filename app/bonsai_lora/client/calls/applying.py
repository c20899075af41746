"""Applying adapters to vectors."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bonsai_lora.client.answers import Applied, AppliedMany, Dtype, Row, Weights
from bonsai_lora.client.call import Call, checked_names, given, path_of, query_of
from bonsai_lora.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy.typing as npt


def apply(
    set_name: str,
    module: str,
    inputs: "npt.ArrayLike",
    *,
    sets: Weights | None = None,
    base_outputs: "npt.ArrayLike | None" = None,
    experts: "npt.ArrayLike | None" = None,
    scale: float = 1.0,
    dtype: Dtype = "F32",
    match: str | None = None,
    version: int | None = None,
) -> Call[Applied]:
    """Return scaling · B·A·x for each row x of `inputs`, (rows, d_in) or (d_in,).

    `sets` adds what further sets add, each times its weight; naming `set_name` there weighs it too.
    `base_outputs` is W·x without bias, for DoRA modules only; `match` is the start of the base's
    tensor names that are meant, if a module path fits several. `experts` is the number of each
    row's expert, for fused experts only. `scale` is a factor on everything that is
    added. `version` is the one of `set_name` that is meant. Raises VersionNotFoundError if the set
    has a different one, ShapeMismatchError, NonFiniteInputError with the position.
    """
    from bonsai_lora.client import tensors  # noqa: PLC0415 - loads NumPy

    sent = given(inputs=inputs, base_outputs=base_outputs, experts=experts)
    return Call(
        method="POST",
        path=path_of("v1", "sets", set_name, "adapters", module, "apply"),
        query=query_of(scale=scale, dtype=dtype, match=match, version=version),
        decode=tensors.decode_applied,
        is_pure=True,
        **tensors.binary_body(sent, tensors.stack_of(sets)),
    )


def apply_many(
    set_name: str,
    inputs: "Mapping[str, npt.ArrayLike] | npt.ArrayLike",
    *,
    modules: Sequence[str] = (),
    sets: Weights | None = None,
    base_outputs: "Mapping[str, npt.ArrayLike] | None" = None,
    experts: "npt.ArrayLike | None" = None,
    scale: float = 1.0,
    dtype: Dtype = "F32",
    match: str | None = None,
    version: int | None = None,
) -> Call[AppliedMany]:
    """Return what several modules of one version of a set add, in one request.

    `inputs` is a mapping from module to vectors, or vectors that each of `modules` gets. Otherwise
    the same as `apply`.
    """
    from bonsai_lora.client import tensors  # noqa: PLC0415 - loads NumPy

    if not modules and not isinstance(inputs, Mapping):
        raise InvalidRequestError(
            "inputs is a batch without modules; expected a mapping from modules to vectors, or "
            "the names of the modules as modules=",
            field="inputs",
        )
    sent = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    for module, value in (base_outputs or {}).items():
        sent[f"{module}.base_outputs"] = value
    sent |= given(experts=experts)
    return Call(
        method="POST",
        path=path_of("v1", "sets", set_name, "apply"),
        query=[
            *query_of(scale=scale, dtype=dtype, match=match, version=version),
            *(("module", one) for one in checked_names(modules, "modules")),
        ],
        decode=tensors.decode_applied_many,
        is_pure=True,
        **tensors.binary_body(sent, tensors.stack_of(sets)),
    )


def apply_mixed(
    module: str,
    sets: Sequence[Row],
    inputs: "npt.ArrayLike",
    *,
    base_outputs: "npt.ArrayLike | None" = None,
    experts: "npt.ArrayLike | None" = None,
    scale: float = 1.0,
    dtype: Dtype = "F32",
    match: str | None = None,
) -> Call[Applied]:
    """Return what one module adds to each row of a batch whose rows go through different sets.

    `sets` has an entry per row: a set's name, None for no set (the row's delta is zero), or a
    mapping from sets to weights. Otherwise the same as `apply`.
    """
    from bonsai_lora.client import tensors  # noqa: PLC0415 - loads NumPy

    sent = given(inputs=inputs, base_outputs=base_outputs, experts=experts)
    return Call(
        method="POST",
        path="/v1/apply",
        query=query_of(scale=scale, dtype=dtype, match=match),
        decode=tensors.decode_applied,
        is_pure=True,
        **tensors.binary_body(sent, {"module": module, "sets": tensors.rows_of(sets)}),
    )
