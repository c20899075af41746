"""What adapters add to a batch: bytes or arrays in, arrays out."""

from collections.abc import Mapping

from app.core.adapter import LoraAdapter
from app.core.cast import Floats
from app.errors import InvalidRequestError, ShapeMismatchError
from app.service.limits import Limits
from app.service.sets import get_adapter
from app.storage.setfile import StoredSet

Inputs = Mapping[str, Floats]


def apply_adapter(stored: StoredSet, module: str, inputs: Floats, limits: Limits) -> Floats:
    """Return what `module` adds for `inputs` (d_in,) or (rows, d_in).

    Raises AdapterNotFoundError, ShapeMismatchError, TooManyRowsError, AnswerTooLargeError.
    """
    return apply_adapters(stored, {module: inputs}, limits)[module]


def apply_adapters(stored: StoredSet, inputs: Inputs, limits: Limits) -> dict[str, Floats]:
    """Return what each module adds for its own inputs; all is checked before anything is computed.

    Raises as `apply_adapter`, and InvalidRequestError where there is no module at all.
    """
    if not inputs:
        raise InvalidRequestError("there are no inputs; give at least one module its vectors")
    adapters = {module: get_adapter(stored, module) for module in inputs}
    for module, adapter in adapters.items():
        check_width(module, adapter, inputs[module])
    limits.check_rows(max(_rows(one) for one in inputs.values()))
    limits.check_answer(sum(_rows(inputs[name]) * one.d_out for name, one in adapters.items()))
    return {module: adapter.apply(inputs[module]) for module, adapter in adapters.items()}


def check_width(module: str, adapter: LoraAdapter, inputs: Floats) -> None:
    """Raise ShapeMismatchError unless `inputs` is as wide as the adapter takes."""
    if inputs.shape[-1] != adapter.d_in:
        raise ShapeMismatchError(
            f"the inputs for {module!r} have width {inputs.shape[-1]}, but it takes "
            f"{adapter.d_in}; nothing is padded or cut",
            module=module,
            got=inputs.shape[-1],
            expected=adapter.d_in,
        )


def _rows(inputs: Floats) -> int:
    return 1 if inputs.ndim == 1 else len(inputs)
