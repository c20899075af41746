"""Inputs and outputs of an apply, in either form."""

from collections.abc import Mapping
from typing import Any

from app.core.cast import Floats, all_finite
from app.errors import InvalidRequestError, NonFiniteOutputError
from app.wire import binary, json
from app.wire.media import Form

INPUTS = "inputs"
OUTPUTS = "outputs"

_FIELDS = frozenset({INPUTS})


def decode_inputs(form: Form, body: bytes, max_header_bytes: int) -> Floats:
    """Return the one batch of a body as float32 (d_in,) or (rows, d_in).

    Raises the errors of `json.decode_tensor` or `binary.decode_tensors`, and InvalidRequestError
    where the body holds anything but `inputs`.
    """
    if form is Form.JSON:
        value = _json_inputs(body)
        return json.decode_tensor(value, INPUTS, body)
    tensors, _ = binary.decode_tensors(body, max_header_bytes)
    if tensors.keys() != {INPUTS}:
        raise InvalidRequestError(
            f"expected exactly one tensor named {INPUTS!r}, got {sorted(tensors)[:8]}",
            got=sorted(tensors)[:8],
            expected=[INPUTS],
        )
    return tensors[INPUTS]


def decode_inputs_by_module(
    form: Form, body: bytes, max_header_bytes: int, modules: list[str]
) -> dict[str, Floats]:
    """Return a batch per module: the body's own, or its one batch for each of `modules`.

    Raises as `decode_inputs`.
    """
    if modules:
        shared = decode_inputs(form, body, max_header_bytes)
        return dict.fromkeys(modules, shared)
    if form is not Form.JSON:
        return binary.decode_tensors(body, max_header_bytes)[0]
    value = _json_inputs(body)
    if not isinstance(value, dict):
        raise InvalidRequestError(
            "'inputs' is one batch, but no module is named: add ?module=q_proj (repeatable), or "
            'send {"inputs": {"q_proj": [[…]]}}',
            field=INPUTS,
        )
    return {
        module: json.decode_tensor(batch, f"{INPUTS}.{module}", body)
        for module, batch in value.items()
    }


def _json_inputs(body: bytes) -> Any:
    value = json.decode_object(body, _FIELDS)
    if INPUTS not in value:
        raise InvalidRequestError(f"the body has no {INPUTS!r}", field=INPUTS)
    return value[INPUTS]


def encode_outputs(
    form: Form, outputs: Floats | Mapping[str, Floats], about: Mapping[str, Any], dtype: str
) -> bytes:
    """Return an answer: `about` and the outputs, as JSON or as safetensors of `dtype`.

    In binary, `about` is the metadata, and one array is the tensor `outputs`. Raises
    NonFiniteOutputError where JSON cannot carry a sum that overflowed float32.
    """
    named = outputs if isinstance(outputs, Mapping) else {OUTPUTS: outputs}
    if form is not Form.JSON:
        return binary.encode_tensors(named, dtype, {key: str(one) for key, one in about.items()})
    for name, array in named.items():
        if not all_finite(array):
            raise NonFiniteOutputError(
                f"the result {name!r} overflows float32, which JSON cannot carry; ask for it with "
                f"Accept: {Form.BINARY.value}, or send smaller inputs",
                field=name,
            )
    return json.encode({**about, OUTPUTS: outputs})
