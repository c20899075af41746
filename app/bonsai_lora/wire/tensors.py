"""Inputs and outputs of an apply, in either form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from json import dumps
from typing import Any

import numpy as np

from bonsai_lora.core.batch import Integers
from bonsai_lora.core.cast import Floats, all_finite
from bonsai_lora.errors import InvalidRequestError, NonFiniteOutputError
from bonsai_lora.wire import binary, json
from bonsai_lora.wire.binary import EXPERTS
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.stacks import (
    SETS,
    Stack,
    check_rows,
    decode_row,
    decode_stack,
    sets_of_metadata,
)

MODULE = "module"
INPUTS = "inputs"
OUTPUTS = "outputs"
BASE_OUTPUTS = "base_outputs"
BASE_ENDING = f".{BASE_OUTPUTS}"
"""Behind a module's name: W x for it, where each module has inputs of its own."""

_TENSORS = frozenset({INPUTS, BASE_OUTPUTS})


@dataclass(eq=False, slots=True)
class Batches:
    """What an apply was given: vectors by module, and W x by module where they were sent."""

    inputs: dict[str, Floats]
    base_outputs: dict[str, Floats]
    stack: Stack = ()
    """Further sets that all rows go through."""
    experts: Integers | None = None
    """Which expert each row goes through, where modules are fused experts."""


@dataclass(frozen=True, eq=False, slots=True)
class MixedBatch:
    """Rows for one module, each through its own sets."""

    module: str
    stacks: list[Stack]
    inputs: Floats
    base_outputs: Floats | None
    experts: Integers | None = None


def decode_one(form: Form, body: Buffer, max_header_bytes: int, module: str) -> Batches:
    """Return the one batch `inputs` (and `base_outputs`) of a body, as that of `module`.

    Arrays are float32 (d_in,) or (rows, d_in). `sets` (binary: JSON in the metadata) are further
    sets that all rows go through. Raises the errors of `json.decode_tensor` or
    `binary.decode_tensors`, and InvalidRequestError for other fields or tensors.
    """
    if form is Form.JSON:
        text = json.Text(body)
        fields = _fields(text, _TENSORS | {SETS, EXPERTS})
        sets, experts = fields.pop(SETS, None), _integers(fields.pop(EXPERTS, None))
        found = _arrays(fields, text)
    else:
        found, metadata, experts = binary.decode_batch(body, max_header_bytes)
        sets = sets_of_metadata(metadata)
        _check_names(found)
    shared = found.get(BASE_OUTPUTS)
    base_outputs = {} if shared is None else {module: shared}
    return Batches({module: found[INPUTS]}, base_outputs, _stack(sets), experts)


def decode_many(form: Form, body: Buffer, max_header_bytes: int, modules: Sequence[str]) -> Batches:
    """Return a batch per module: the body's own, or its one batch for each of `modules`.

    `sets` (binary: JSON in the metadata) are further sets that all rows go through. In binary,
    `<module>.base_outputs` beside `<module>` is W x of a DoRA module. Raises as `decode_one`.
    """
    if form is not Form.JSON:
        tensors, metadata, experts = binary.decode_batch(body, max_header_bytes)
        batches = _shared(tensors, modules) if modules else _split(tensors)
        return replace(batches, stack=_stack(sets_of_metadata(metadata)), experts=experts)
    text = json.Text(body)
    fields = _fields(text, _TENSORS | {SETS, EXPERTS})
    stack, experts = _stack(fields.pop(SETS, None)), _integers(fields.pop(EXPERTS, None))
    if modules:
        return replace(_shared(_arrays(fields, text), modules), stack=stack, experts=experts)
    for name, value in fields.items():
        if not isinstance(value, dict):
            raise InvalidRequestError(
                f"{name!r} is one batch, but no module is named: add ?module=q_proj (repeatable), "
                'or send {"inputs": {"q_proj": [[…]]}}',
                field=name,
            )
    decoded = {
        name: {
            module: json.decode_tensor(batch, f"{name}.{module}", text)
            for module, batch in value.items()
        }
        for name, value in fields.items()
    }
    return Batches(decoded[INPUTS], decoded.get(BASE_OUTPUTS, {}), stack, experts)


def decode_mixed(form: Form, body: Buffer, max_header_bytes: int) -> MixedBatch:
    """Return the batch of a body: `module`, `sets`, `inputs` (and `base_outputs` for DoRA).

    In binary, `module` and `sets` are JSON in the metadata (a bare module name is taken too).
    Raises as `decode_one` and `decode_row`, and ShapeMismatchError where `sets` has not one entry
    per row.
    """
    if form is Form.JSON:
        text = json.Text(body)
        fields = _fields(text, _TENSORS | {MODULE, SETS, EXPERTS})
        module, sets = fields.pop(MODULE, None), fields.pop(SETS, None)
        experts = _integers(fields.pop(EXPERTS, None))
        tensors = _arrays(fields, text)
    else:
        tensors, metadata, experts = binary.decode_batch(body, max_header_bytes)
        _check_names(tensors)
        module, sets = metadata.get(MODULE), sets_of_metadata(metadata)
        if module is not None and module.startswith('"'):
            module = json.decode(module.encode(), f"the metadata {MODULE!r}")
    if not isinstance(module, str):
        raise InvalidRequestError(f"{MODULE!r} must name the module, as a string", field=MODULE)
    if not isinstance(sets, list):
        raise InvalidRequestError(
            f"{SETS!r} must be a list with one entry per row: a set's name, null, or a list of "
            '{"set": name, "weight": number}',
            field=SETS,
        )
    check_rows(sets, tensors[INPUTS])
    stacks = [decode_row(one, f"{SETS}[{row}]") for row, one in enumerate(sets)]
    return MixedBatch(module, stacks, tensors[INPUTS], tensors.get(BASE_OUTPUTS), experts)


def _stack(sets: Any) -> Stack:
    return () if sets is None else decode_stack(sets, SETS)


def _arrays(fields: Mapping[str, Any], text: json.Text) -> dict[str, Floats]:
    return {name: json.decode_tensor(one, name, text) for name, one in fields.items()}


def _integers(value: Any) -> Integers | None:
    """Return the JSON field `experts`; raises InvalidRequestError for anything but integers."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise InvalidRequestError(
            f"{EXPERTS!r} must be a list with one expert's number per row", field=EXPERTS
        )
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise InvalidRequestError(
            f"{EXPERTS!r} has numbers that no expert can have", field=EXPERTS
        ) from None


def _shared(tensors: Mapping[str, Floats], modules: Sequence[str]) -> Batches:
    """Return one batch for each of `modules`, whose outputs differ, so W x cannot be shared."""
    if tensors.keys() != {INPUTS}:
        _check_names(tensors)
        raise InvalidRequestError(
            f"{BASE_OUTPUTS!r} cannot be shared by several modules; send them by module",
            field=BASE_OUTPUTS,
        )
    return Batches(dict.fromkeys(modules, tensors[INPUTS]), {})


def _split(tensors: Mapping[str, Floats]) -> Batches:
    given = {name: one for name, one in tensors.items() if name.endswith(BASE_ENDING)}
    inputs = {name: one for name, one in tensors.items() if name not in given}
    return Batches(inputs, {name.removesuffix(BASE_ENDING): one for name, one in given.items()})


def _fields(text: json.Text, allowed: frozenset[str]) -> dict[str, Any]:
    value = json.decode_object(text.body, allowed)
    if INPUTS not in value:
        raise InvalidRequestError(f"the body has no {INPUTS!r}", field=INPUTS)
    return value


def _check_names(tensors: Mapping[str, Any]) -> None:
    if INPUTS not in tensors or tensors.keys() - _TENSORS:
        raise InvalidRequestError(
            f"expected the tensor {INPUTS!r} (and {BASE_OUTPUTS!r} for DoRA), got "
            f"{sorted(tensors)[:8]}",
            got=sorted(tensors)[:8],
            expected=[INPUTS],
        )


def encode_outputs(
    form: Form, outputs: Floats | Mapping[str, Floats], about: Mapping[str, Any], dtype: str
) -> list[Buffer]:
    """Return an answer in parts: `about` and the outputs, as JSON or as safetensors of `dtype`.

    In binary, `about` is the metadata, and one array is the tensor `outputs`. Raises
    NonFiniteOutputError where JSON cannot carry a sum that overflowed float32.
    """
    named = outputs if isinstance(outputs, Mapping) else {OUTPUTS: outputs}
    if form is not Form.JSON:
        metadata = {
            key: dumps(one) if type(one) is dict else str(one) for key, one in about.items()
        }
        return binary.encode_tensors(named, dtype, metadata)
    for name, array in named.items():
        check_json_output(name, array)
    return json.encode({**about, OUTPUTS: outputs})


def check_json_output(name: str, array: Floats) -> None:
    """Raise NonFiniteOutputError where `array` holds what JSON cannot carry."""
    if not all_finite(array):
        raise NonFiniteOutputError(
            f"the result {name!r} overflows float32, which JSON cannot carry; use the binary form "
            f"({Form.BINARY.value}), or smaller inputs",
            field=name,
        )
