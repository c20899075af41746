"""Inputs and outputs of an apply, in either form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.core.cast import Floats, all_finite
from app.errors import InvalidRequestError, NonFiniteOutputError
from app.wire import binary, json
from app.wire.media import Form

INPUTS = "inputs"
OUTPUTS = "outputs"
BASE_OUTPUTS = "base_outputs"

_FIELDS = frozenset({INPUTS, BASE_OUTPUTS})


@dataclass(frozen=True, slots=True)
class Batches:
    """What an apply was given: vectors by module, and W x by module where they were sent."""

    inputs: dict[str, Floats]
    base_outputs: dict[str, Floats]


def decode_one(form: Form, body: bytes, max_header_bytes: int, module: str) -> Batches:
    """Return the one batch `inputs` (and `base_outputs`) of a body, as that of `module`.

    Arrays are float32 (d_in,) or (rows, d_in). Raises the errors of `json.decode_tensor` or
    `binary.decode_tensors`, and InvalidRequestError for other fields or tensors.
    """
    if form is Form.JSON:
        found = {name: json.decode_tensor(one, name, body) for name, one in _fields(body).items()}
    else:
        found = binary.decode_tensors(body, max_header_bytes)[0]
        _check_names(found)
    shared = found.get(BASE_OUTPUTS)
    return Batches({module: found[INPUTS]}, {} if shared is None else {module: shared})


def decode_many(form: Form, body: bytes, max_header_bytes: int, modules: list[str]) -> Batches:
    """Return a batch per module: the body's own, or its one batch for each of `modules`.

    In binary, `<module>.base_outputs` beside `<module>` is W x of a DoRA module. Raises as
    `decode_one`.
    """
    if modules:
        (shared,) = decode_one(form, body, max_header_bytes, "").inputs.values()
        return Batches(dict.fromkeys(modules, shared), {})
    if form is not Form.JSON:
        return _split(binary.decode_tensors(body, max_header_bytes)[0])
    fields = _fields(body)
    for name, value in fields.items():
        if not isinstance(value, dict):
            raise InvalidRequestError(
                f"{name!r} is one batch, but no module is named: add ?module=q_proj (repeatable), "
                'or send {"inputs": {"q_proj": [[…]]}}',
                field=name,
            )
    decoded = {
        name: {
            module: json.decode_tensor(batch, f"{name}.{module}", body)
            for module, batch in value.items()
        }
        for name, value in fields.items()
    }
    return Batches(decoded[INPUTS], decoded.get(BASE_OUTPUTS, {}))


def _split(tensors: dict[str, Floats]) -> Batches:
    ending = f".{BASE_OUTPUTS}"
    given = {name: one for name, one in tensors.items() if name.endswith(ending)}
    inputs = {name: one for name, one in tensors.items() if name not in given}
    return Batches(inputs, {name.removesuffix(ending): one for name, one in given.items()})


def _fields(body: bytes) -> dict[str, Any]:
    value = json.decode_object(body, _FIELDS)
    if INPUTS not in value:
        raise InvalidRequestError(f"the body has no {INPUTS!r}", field=INPUTS)
    return value


def _check_names(tensors: Mapping[str, Floats]) -> None:
    if INPUTS not in tensors or tensors.keys() - _FIELDS:
        raise InvalidRequestError(
            f"expected the tensor {INPUTS!r} (and {BASE_OUTPUTS!r} for DoRA), got "
            f"{sorted(tensors)[:8]}",
            got=sorted(tensors)[:8],
            expected=[INPUTS],
        )


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
