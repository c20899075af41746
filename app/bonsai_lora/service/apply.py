"""Apply the adapters of one or more sets to a batch."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.core import backend
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.batch import (
    Integers,
    Rows,
    Segment,
    apply_segments,
    expert_segments,
    rows_of,
)
from bonsai_lora.core.cast import Floats, count_rows
from bonsai_lora.errors import (
    DoraNeedsBaseError,
    InvalidRequestError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)
from bonsai_lora.service.adapters import get_adapter
from bonsai_lora.service.dora import norms_of
from bonsai_lora.service.experts import check_experts
from bonsai_lora.service.keys import Meter
from bonsai_lora.service.limits import Limits
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.stacks import Stack
from bonsai_lora.wire.tensors import Batches

Inputs = Mapping[str, Floats]

_MOST_JSON_BYTES = 1 << 21
"""Longer JSON may take a second to parse, if it is invalid or unusual."""
_IN_NUMPY = 5
"""Factor on the cost of an apply without the kernels."""
_JSON_BYTES = 10
"""Approximate length of a number and its comma."""

Reserve = Callable[[int], None]
"""Reserve memory for this many bytes of outputs; raises BusyError or MemoryBudgetError."""

ReadSet = Callable[[str], StoredSet]
"""Return the current version of a set; raises SetNotFoundError."""


@dataclass(eq=False, slots=True)
class SetSegment:
    """The rows of a batch that one set applies to, and their weights."""

    stored: StoredSet
    weights: float | Floats = 1.0
    """One weight for all rows, or one per row."""
    rows: Rows | None = None
    """None for all rows."""

    @property
    def index(self) -> Rows:
        """The rows as an index into the batch."""
        return slice(None) if self.rows is None else self.rows


def group_by_set(stacks: Sequence[Stack], scale: float, read: ReadSet) -> list[SetSegment]:
    """Group the rows of a batch, given one stack per row, by set; `scale` multiplies all weights.

    Each set is read once, so that all its rows use the same version. Raises SetNotFoundError, and
    InvalidRequestError if no row names a set.
    """
    rows: defaultdict[str, list[int]] = defaultdict(list)
    weights: defaultdict[str, list[float]] = defaultdict(list)
    for number, stack in enumerate(stacks):
        for name, weight in stack:
            rows[name].append(number)
            weights[name].append(weight * scale)
    if not rows:
        raise InvalidRequestError(
            "no row names a set, so the width of the outputs is unknown; name a set for at least "
            "one row",
            field="sets",
        )
    # By name: a row's sum must not depend on the order in which other rows name their sets.
    return [
        SetSegment(read(name), np.array(weights[name]), rows_of(rows[name]))
        for name in sorted(rows)
    ]


def stack_on(stored: StoredSet, stack: Stack, scale: float, read: ReadSet) -> list[SetSegment]:
    """Return the segments of a batch whose rows all use `stored` and the sets of `stack`.

    `stored` has weight 1 unless `stack` names it. Raises SetNotFoundError.
    """
    if not stack:
        return [SetSegment(stored, scale)]
    own = stored.record.name
    weights = {own: 1.0} | dict(stack)
    return [
        SetSegment(stored if name == own else read(name), weight * scale)
        for name, weight in sorted(weights.items())
    ]


def versions_of(set_segments: Sequence[SetSegment]) -> dict[str, int]:
    """Return the version used of each set."""
    return {one.stored.record.name: one.stored.record.version for one in set_segments}


@dataclass(frozen=True, slots=True)
class Applier:
    """Applies adapters within `limits`; DoRA's row norms come from `bases`."""

    limits: Limits
    bases: BaseFolder
    may_take_long: bool = False
    """Whether norms that are not cached may be computed: only in the long lane."""
    meter: Meter | None = None
    """Counts the caller's rows."""

    def apply(
        self,
        set_segments: Sequence[SetSegment],
        batches: Batches,
        match: str | None = None,
        *,
        reserve: Reserve,
    ) -> dict[str, Floats]:
        """Return the summed deltas of `set_segments` by module, for inputs (d_in,) or (rows, d_in).

        W x is for DoRA modules only, whose norms come from the base tensors that `match` is the
        prefix of, and experts are for fused modules only. Everything is checked before anything is
        computed. Raises InvalidRequestError if there are no inputs, the errors of `check_experts`,
        `norms_of` and `reserve`, AdapterNotFoundError, ShapeMismatchError, TooManyRowsError,
        AnswerTooLargeError, DoraNeedsBaseError, RateLimitedError, and UnsupportedAdapterError for a
        module whose bias is replaced, or a DoRA module that is weighted or stacked.
        """
        inputs = batches.inputs
        if not inputs:
            raise InvalidRequestError("the request has no inputs; send vectors for a module")
        adapters, rows, values = {}, {}, 0
        for module, batch in inputs.items():
            some = adapters[module] = _adapters_of(module, set_segments, batch)
            count = rows[module] = count_rows(batch)
            values += count * some[0].d_out
        check_experts(adapters, rows, batches.experts)
        self.limits.check_rows(max(rows.values()))
        self.limits.check_answer(values)
        planned = {
            module: self._plan(module, set_segments, some, batches, match)
            for module, some in adapters.items()
        }
        reserve(4 * values)
        if self.meter is not None:
            self.meter.take_rows(sum(rows.values()))
        return {module: compute() for module, compute in planned.items()}

    def _plan(
        self,
        module: str,
        set_segments: Sequence[SetSegment],
        adapters: Sequence[LoraAdapter],
        batches: Batches,
        match: str | None,
    ) -> Callable[[], Floats]:
        """Check one module's inputs and return its computation, which raises nothing."""
        first, x = adapters[0], batches.inputs[module]
        is_simple = first.magnitude is None and first.experts is None
        if len(set_segments) == 1 and set_segments[0].rows is None and is_simple:
            return partial(first.apply, x, set_segments[0].weights)
        d_out, base_outputs = first.d_out, batches.base_outputs.get(module)
        if any(one.magnitude is not None for one in adapters):
            _check_dora(module, set_segments, adapters, count_rows(x))
            base_outputs = _check_base_outputs(module, base_outputs, (*x.shape[:-1], d_out))
        segments = [
            segment
            for one, adapter in zip(set_segments, adapters, strict=True)
            for segment in self._segments(
                module,
                one,
                adapter,
                None if base_outputs is None else base_outputs.reshape(count_rows(x), d_out),
                batches.experts,
                match,
            )
        ]
        batch = x.reshape(count_rows(x), x.shape[-1])
        return lambda: apply_segments(batch, segments, d_out).reshape(*x.shape[:-1], d_out)

    def _segments(
        self,
        module: str,
        one: SetSegment,
        adapter: LoraAdapter,
        base_outputs: Floats | None,
        experts: Integers | None,
        match: str | None,
    ) -> list[Segment]:
        """Return the segments of one set: one per expert in use if the module is fused."""
        if adapter.experts is not None and experts is not None:
            return expert_segments(adapter, one.index, one.weights, experts)
        if adapter.magnitude is None or base_outputs is None:
            return [Segment(adapter, one.index, one.weights)]
        norms = norms_of(
            one.stored, module, adapter, self.bases, match, may_take_long=self.may_take_long
        )
        return [Segment(adapter, one.index, one.weights, base_outputs, norms)]


def _adapters_of(module: str, set_segments: Sequence[SetSegment], x: Floats) -> list[LoraAdapter]:
    """Return the adapter of each segment; raises if one is missing or has a different shape."""
    adapters = [get_adapter(one.stored, module) for one in set_segments]
    for one, adapter in zip(set_segments, adapters, strict=True):
        check_no_replaced_bias(one.stored, module)
        check_width(module, adapter, x)
        if adapter.d_out != adapters[0].d_out:
            raise ShapeMismatchError(
                f"module {module!r} has outputs of width {adapter.d_out} in set "
                f"{one.stored.record.name!r}, but {adapters[0].d_out} in set "
                f"{set_segments[0].stored.record.name!r}; combine only sets for the same model",
                module=module,
                got=adapter.d_out,
                expected=adapters[0].d_out,
            )
    return adapters


def _check_dora(
    module: str, set_segments: Sequence[SetSegment], adapters: Sequence[LoraAdapter], rows: int
) -> None:
    """Raise UnsupportedAdapterError if a row with DoRA has a weight, or another set."""
    sets_per_row = np.zeros(rows, np.intp)
    for one in set_segments:
        sets_per_row[one.index] += 1
    for one, adapter in zip(set_segments, adapters, strict=True):
        if adapter.magnitude is None:
            continue
        if np.any(sets_per_row[one.index] > 1) or np.any(np.not_equal(one.weights, 1.0)):
            raise UnsupportedAdapterError(
                f"module {module!r} of set {one.stored.record.name!r} is DoRA, which scales the "
                "whole output and cannot be weighted or stacked; apply the set alone with weight 1",
                set=one.stored.record.name,
                module=module,
            )


def _check_base_outputs(module: str, given: Floats | None, expected: tuple[int, ...]) -> Floats:
    if given is None:
        raise DoraNeedsBaseError(
            f"module {module!r} is DoRA, whose outputs depend on the base layer's; send "
            "base_outputs (W·x without bias) with the inputs",
            module=module,
        )
    if given.shape != expected:
        raise ShapeMismatchError(
            f"base_outputs for {module!r} have shape {list(given.shape)}; expected "
            f"{list(expected)}",
            module=module,
            got=list(given.shape),
            expected=list(expected),
        )
    return given


def check_no_replaced_bias(stored: StoredSet, module: str) -> None:
    """Raise UnsupportedAdapterError if the adapter replaces the module's bias."""
    replaced = stored.lora_set.replacements
    if replaced and f"{module}.bias" in replaced:
        raise UnsupportedAdapterError(
            f"the adapter replaces the bias of {module!r}, which a delta cannot express; use a "
            "merged checkpoint",
            module=module,
        )


def check_width(module: str, adapter: LoraAdapter, inputs: Floats) -> None:
    """Raise ShapeMismatchError unless the width of `inputs` is the adapter's d_in."""
    if inputs.shape[-1] != adapter.d_in:
        why = ", as an empty list has no rows" if inputs.shape == (0,) else ""
        raise ShapeMismatchError(
            f"the inputs for {module!r} have width {inputs.shape[-1]}{why}; expected "
            f"{adapter.d_in}",
            module=module,
            got=inputs.shape[-1],
            expected=adapter.d_in,
        )


def total_rows(inputs: Inputs) -> int:
    """Return the number of vectors in all batches."""
    return sum(map(count_rows, inputs.values()))


def cost_of_body(
    adapter: LoraAdapter, body_bytes: int, request_form: Form, response_form: Form
) -> float:
    """Estimate the nanoseconds of an apply before its body is decoded."""
    if adapter.d_in == 0 or (request_form is Form.JSON and body_bytes > _MOST_JSON_BYTES):
        return math.inf
    values = body_bytes / (_JSON_BYTES if request_form is Form.JSON else 4)
    return cost_of(adapter, max(1.0, values / adapter.d_in), request_form, response_form)


def cost_of(adapter: LoraAdapter, rows: float, request_form: Form, response_form: Form) -> float:
    """Estimate the nanoseconds of an apply; infinite if it has to read a file first.

    Measured costs per number: 11 to parse from JSON, 9 to write, 1 in binary; per multiply-add:
    0.02 in SIMD vectors, 0.65 in the remainder of a width.
    """
    if adapter.magnitude is not None or not adapter.is_ready:
        return math.inf
    read = rows * adapter.d_in * (11 if request_form is Form.JSON else 1)
    written = rows * adapter.d_out * (9 if response_form is Form.JSON else 1)
    left_over = adapter.d_in % 16 + adapter.d_out % 16
    added = (adapter.d_in + adapter.d_out) * 0.02 + left_over * 0.65
    cost = read + written + rows * adapter.rank * added
    return cost if backend.running() else _IN_NUMPY * cost
