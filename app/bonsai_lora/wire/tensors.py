"""Decode the inputs and encode the outputs of an apply, as JSON or safetensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from json import dumps
from typing import Any

import numpy as np

from bonsai_lora.core.batch import Integers
from bonsai_lora.core.cast import Floats, all_finite, count_rows
from bonsai_lora.errors import (
    InvalidRequestError,
    NonFiniteOutputError,
    ShapeMismatchError,
    counted,
)
from bonsai_lora.validation import as_written
from bonsai_lora.wire import binary, json
from bonsai_lora.wire.binary import EXPERTS
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.stacks import (
    SETS,
    Stack,
    decode_row,
    decode_stack,
    sets_of_metadata,
)

MODULE = "module"
INPUTS = "inputs"
OUTPUTS = "outputs"
BASE_OUTPUTS = "base_outputs"
BASE_ENDING = f".{BASE_OUTPUTS}"
"""Suffix after a module's name for its W x, if each module has its own inputs."""
MAX_BATCHES = 1 << 15
"""Most modules of a request."""

_TENSORS = frozenset({INPUTS, BASE_OUTPUTS})


@dataclass(eq=False, slots=True)
class Batches:
    """The decoded body of an apply."""

    inputs: dict[str, Floats]
    """Vectors by module."""
    base_outputs: dict[str, Floats]
    """W x by module, if sent."""
    stack: Stack = ()
    """Additional sets for all rows."""
    experts: Integers | None = None
    """Number of the expert of each row, if sent: (rows,)."""


def decode_one(
    form: Form, body: Buffer, max_header_bytes: int, module: str, *, may_take_long: bool = True
) -> Batches:
    """Decode a body with one batch `inputs` (and `base_outputs`) for `module`.

    Arrays are float32 (d_in,) or (rows, d_in). `sets` (in binary: JSON in the metadata) are
    additional sets for all rows. Raises the errors of `json.decode_with_arrays` and
    `json.decode_tensor`, or `binary.decode_batch`, and InvalidRequestError for unknown or missing
    fields or tensors.
    """
    if form is Form.JSON:
        fields = _fields(body, _TENSORS | {SETS, EXPERTS}, may_take_long)
        sets, experts = fields.pop(SETS, None), decode_experts(fields.pop(EXPERTS, None))
        found = _arrays(fields)
    else:
        found, metadata, experts = binary.decode_batch(
            body, max_header_bytes, may_take_long=may_take_long
        )
        sets = sets_of_metadata(metadata)
        _check_names(found)
    return _of_module(module, found, experts, _stack(sets))


def decode_many(
    form: Form,
    body: Buffer,
    max_header_bytes: int,
    modules: Sequence[str],
    *,
    may_take_long: bool = True,
) -> Batches:
    """Decode a body with a batch per module, or with one batch for all of `modules`.

    `sets` (in binary: JSON in the metadata) are additional sets for all rows. In binary, the tensor
    `<module>.base_outputs` is W x of a DoRA module. Raises the errors of `decode_one`.
    """
    if form is not Form.JSON:
        tensors, metadata, experts = binary.decode_batch(
            body, max_header_bytes, may_take_long=may_take_long
        )
        batches = _shared(tensors, modules) if modules else _split(tensors)
        return replace(batches, stack=_stack(sets_of_metadata(metadata)), experts=experts)
    fields = _fields(body, _TENSORS | {SETS, EXPERTS}, may_take_long)
    stack, experts = _stack(fields.pop(SETS, None)), decode_experts(fields.pop(EXPERTS, None))
    if modules:
        return replace(_shared(_arrays(fields), modules), stack=stack, experts=experts)
    for name, value in fields.items():
        if not isinstance(value, dict):
            raise InvalidRequestError(
                f"{name!r} is a batch without a module; add ?module=q_proj (repeatable), or send "
                '{"inputs": {"q_proj": [[…]]}}',
                field=name,
            )
        if len(value) > MAX_BATCHES:
            raise InvalidRequestError(
                f"{name!r} has {len(value)} batches, but the limit is {MAX_BATCHES}; send fewer "
                "modules at once",
                field=name,
                got=len(value),
                limit=MAX_BATCHES,
            )
    decoded = {
        name: {
            module: json.decode_tensor(batch, f"{name}.{module}") for module, batch in value.items()
        }
        for name, value in fields.items()
    }
    return Batches(decoded[INPUTS], decoded.get(BASE_OUTPUTS, {}), stack, experts)


def decode_mixed(
    form: Form, body: Buffer, max_header_bytes: int, *, may_take_long: bool = True
) -> tuple[str, list[Stack], Batches]:
    """Decode a body with `module`, `sets`, `inputs` (and `base_outputs` for DoRA).

    Returns the module, the sets of each row, and the batch. In binary, `module` and `sets` are JSON
    in the metadata; a bare module name is accepted too. Raises the errors of `decode_one` and
    `decode_row`, and ShapeMismatchError unless `sets` has one entry per row.
    """
    if form is Form.JSON:
        fields = _fields(body, _TENSORS | {MODULE, SETS, EXPERTS}, may_take_long)
        module, sets = fields.pop(MODULE, None), fields.pop(SETS, None)
        experts = decode_experts(fields.pop(EXPERTS, None))
        tensors = _arrays(fields)
    else:
        tensors, metadata, experts = binary.decode_batch(
            body, max_header_bytes, may_take_long=may_take_long
        )
        _check_names(tensors)
        module, sets = metadata.get(MODULE), sets_of_metadata(metadata)
        if module is not None and module.startswith('"'):
            module = json.decode(module.encode(), f"the metadata {MODULE!r}")
    if not isinstance(module, str):
        raise InvalidRequestError(
            f"{MODULE!r} is {_shown(module)}; expected the name of the module", field=MODULE
        )
    if not isinstance(sets, list):
        raise InvalidRequestError(
            f"{SETS!r} is {_shown(sets)}; expected a list with one entry per row: the name "
            'of a set, null, or a list of {"set": name, "weight": number}',
            field=SETS,
        )
    if tensors[INPUTS].shape == (0,):
        raise ShapeMismatchError(
            f"{INPUTS!r} is an empty list, which has no rows; send one vector per row", field=INPUTS
        )
    rows = count_rows(tensors[INPUTS])
    if len(sets) != rows:
        raise ShapeMismatchError(
            f"{SETS!r} is for {counted(len(sets), 'row')}, but {INPUTS!r} has "
            f"{rows}; send one entry per row (null for no adapter)",
            field=SETS,
            got=len(sets),
            expected=rows,
        )
    stacks = [decode_row(one, f"{SETS}[{row}]") for row, one in enumerate(sets)]
    return module, stacks, _of_module(module, tensors, experts)


def _shown(value: Any) -> str:
    return "missing" if value is None else as_written(value)


def decode_experts(value: Any) -> Integers | None:
    """Return the JSON list `experts`, or None; raises InvalidRequestError unless all are ints."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise InvalidRequestError(
            f"{EXPERTS!r} is {as_written(value)}; expected a list with the number of an expert "
            "per row",
            field=EXPERTS,
        )
    try:
        # Of a generator, so that other threads run in between.
        return np.fromiter((one for one in value), np.int64, len(value))
    except OverflowError:
        raise InvalidRequestError(
            f"{EXPERTS!r} is {as_written(value)}, with numbers beyond 64 bits; send the numbers "
            "of experts",
            field=EXPERTS,
        ) from None


def _stack(sets: Any) -> Stack:
    return () if sets is None else decode_stack(sets, SETS)


def _arrays(fields: Mapping[str, Any]) -> dict[str, Floats]:
    return {name: json.decode_tensor(one, name) for name, one in fields.items()}


def _of_module(
    module: str, tensors: Mapping[str, Floats], experts: Integers | None, stack: Stack = ()
) -> Batches:
    base_outputs = {module: tensors[BASE_OUTPUTS]} if BASE_OUTPUTS in tensors else {}
    return Batches({module: tensors[INPUTS]}, base_outputs, stack, experts)


def _shared(tensors: Mapping[str, Floats], modules: Sequence[str]) -> Batches:
    """Return the shared batch for each of `modules`; W x differs by module and is refused."""
    if tensors.keys() != {INPUTS}:
        _check_names(tensors)
        raise InvalidRequestError(
            f"{BASE_OUTPUTS!r} cannot be shared by several modules; send one per module",
            field=BASE_OUTPUTS,
        )
    return Batches(dict.fromkeys(modules, tensors[INPUTS]), {})


def _split(tensors: Mapping[str, Floats]) -> Batches:
    base_outputs = {name: one for name, one in tensors.items() if name.endswith(BASE_ENDING)}
    inputs = {name: one for name, one in tensors.items() if name not in base_outputs}
    return Batches(
        inputs, {name.removesuffix(BASE_ENDING): one for name, one in base_outputs.items()}
    )


def _fields(body: Buffer, allowed: frozenset[str], may_take_long: bool) -> dict[str, Any]:  # noqa: FBT001
    value = json.decode_object(body, allowed, may_take_long=may_take_long)
    if INPUTS not in value:
        raise InvalidRequestError(f"the body has no {INPUTS!r}; add it", field=INPUTS)
    return value


def _check_names(tensors: Mapping[str, Any]) -> None:
    if INPUTS not in tensors or tensors.keys() - _TENSORS:
        found = json.first_names(tensors)
        raise InvalidRequestError(
            f"the body has the tensors {found}; expected {INPUTS!r}, and for DoRA {BASE_OUTPUTS!r}",
            got=found,
            expected=[INPUTS],
        )


def encode_outputs(
    form: Form, outputs: Floats | Mapping[str, Floats], fields: Mapping[str, Any], dtype: str
) -> list[Buffer]:
    """Return a response body in parts: `fields` and outputs, as JSON or as safetensors of `dtype`.

    In binary, `fields` becomes the metadata, and a single array is named `outputs`. Raises
    NonFiniteOutputError if a JSON output overflows float32.
    """
    named = {OUTPUTS: outputs} if isinstance(outputs, np.ndarray) else outputs
    if form is not Form.JSON:
        metadata = {
            key: dumps(one) if type(one) is dict else str(one) for key, one in fields.items()
        }
        return binary.encode_tensors(named, dtype, metadata)
    for name, array in named.items():
        check_json_output(name, array)
    return json.encode({**fields, OUTPUTS: outputs})


def check_json_output(name: str, array: Floats) -> None:
    """Raise NonFiniteOutputError if `array` has NaN or infinity, which JSON cannot carry."""
    if not all_finite(array):
        raise NonFiniteOutputError(
            f"the result {name!r} overflows float32, which JSON cannot carry; request binary "
            f"({Form.BINARY}), or send smaller inputs",
            field=name,
        )
