"""What adapters add to a batch: bytes or arrays in, arrays out."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.checkpoints.bases import BaseFolder
from app.core.adapter import LoraAdapter
from app.core.cast import Floats
from app.errors import (
    DoraNeedsBaseError,
    InvalidRequestError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)
from app.service.dora import norms_of
from app.service.limits import Limits
from app.service.sets import get_adapter
from app.storage.setfile import StoredSet
from app.wire.media import Form

Inputs = Mapping[str, Floats]

INLINE_NANOSECONDS = 500_000


@dataclass(frozen=True, slots=True)
class Applier:
    """Applies adapters within `limits`; DoRA's row norms come from `bases`."""

    limits: Limits
    bases: BaseFolder

    def apply(self, stored: StoredSet, inputs: Inputs, base_outputs: Inputs) -> dict[str, Floats]:
        """Return what each module adds for its own inputs (d_in,) or (rows, d_in).

        `base_outputs` are W x without bias, for DoRA modules only. All is checked before anything
        is computed. Raises InvalidRequestError where there is no module at all,
        AdapterNotFoundError, ShapeMismatchError, TooManyRowsError, AnswerTooLargeError,
        DoraNeedsBaseError, and UnsupportedAdapterError for a module whose bias is replaced.
        """
        adapters = self._checked(stored, inputs)
        norms = {
            module: self._dora_norms(stored, module, adapter, inputs[module], base_outputs)
            for module, adapter in adapters.items()
            if adapter.magnitude is not None
        }
        return {
            module: adapter.apply(inputs[module])
            if module not in norms
            else adapter.apply_dora(inputs[module], base_outputs[module], norms[module])
            for module, adapter in adapters.items()
        }

    def _checked(self, stored: StoredSet, inputs: Inputs) -> dict[str, LoraAdapter]:
        if not inputs:
            raise InvalidRequestError("there are no inputs; give at least one module its vectors")
        adapters = {module: get_adapter(stored, module) for module in inputs}
        for module, adapter in adapters.items():
            check_no_replaced_bias(stored, module)
            check_width(module, adapter, inputs[module])
        self.limits.check_rows(max(_rows(one) for one in inputs.values()))
        values = sum(_rows(inputs[module]) * one.d_out for module, one in adapters.items())
        self.limits.check_answer(values)
        return adapters

    def _dora_norms(
        self,
        stored: StoredSet,
        module: str,
        adapter: LoraAdapter,
        inputs: Floats,
        base_outputs: Inputs,
    ) -> Floats:
        given = base_outputs.get(module)
        if given is None:
            raise DoraNeedsBaseError(
                f"module {module!r} is DoRA: its outputs need base_outputs (W·x without bias) "
                "beside the inputs",
                module=module,
            )
        expected = (*inputs.shape[:-1], adapter.d_out)
        if given.shape != expected:
            raise ShapeMismatchError(
                f"base_outputs for {module!r} have shape {list(given.shape)}; expected "
                f"{list(expected)}",
                module=module,
                got=list(given.shape),
                expected=list(expected),
            )
        return norms_of(stored, module, adapter, self.bases)


def check_no_replaced_bias(stored: StoredSet, module: str) -> None:
    """Raise UnsupportedAdapterError where the adapter replaces the module's bias."""
    if f"{module}.bias" in stored.lora_set.replacements:
        raise UnsupportedAdapterError(
            f"the adapter replaces the bias of {module!r}, which its weights and deltas "
            "cannot say; use a merged checkpoint",
            module=module,
        )


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


def rows_of(inputs: Inputs) -> int:
    """Return the number of vectors in all batches."""
    return sum(_rows(one) for one in inputs.values())


def is_small(adapter: LoraAdapter, body_bytes: int, taken: Form, given: Form) -> bool:
    """Return whether an apply takes under a millisecond by estimate, from before it is read.

    A thread costs about 0.1 ms to reach. Costs in nanoseconds per number, measured here: 36 to
    read from JSON, 24 to write, 1 in binary; 0.02 per multiply-add.
    """
    if adapter.d_in == 0:
        return False
    values = body_bytes / (8 if taken is Form.JSON else 2)
    rows = max(1.0, values / adapter.d_in)
    read = values * (36 if taken is Form.JSON else 1)
    written = rows * adapter.d_out * (24 if given is Form.JSON else 1)
    product = rows * adapter.rank * (adapter.d_in + adapter.d_out) * 0.02
    return read + written + product < INLINE_NANOSECONDS


def _rows(inputs: Floats) -> int:
    return 1 if inputs.ndim == 1 else len(inputs)
