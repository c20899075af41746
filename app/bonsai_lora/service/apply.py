"""What adapters add to a batch: bytes or arrays in, arrays out."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bonsai_lora.checkpoints.bases import BaseFolder
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
from bonsai_lora.service.dora import norms_of
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.sets import get_adapter
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.stacks import Stack

Inputs = Mapping[str, Floats]

_MOST_JSON_BYTES = 1 << 21
"""Longer JSON may take a second, where something in it is wrong or uncommon."""
_JSON_BYTES = 10
"""Of a number and its comma, about."""

Read = Callable[[str], StoredSet]
"""Gives a set as it is now; raises SetNotFoundError."""


@dataclass(eq=False, slots=True)
class Share:
    """The part that one set takes in a batch: which rows, and at which weight."""

    stored: StoredSet
    weights: float | Floats = 1.0
    """One for all its rows, or one per row."""
    rows: Rows | None = None
    """None: all."""

    @property
    def places(self) -> Rows:
        """Its rows, in any case as an index."""
        return slice(None) if self.rows is None else self.rows


def shares_of(stacks: Sequence[Stack], scale: float, read: Read) -> list[Share]:
    """Return the share of each set that `stacks`, one per row, name; `scale` weighs all.

    Each set is read once, so all its rows see one version. Raises SetNotFoundError, and
    InvalidRequestError where no row names a set.
    """
    rows: defaultdict[str, list[int]] = defaultdict(list)
    weights: defaultdict[str, list[float]] = defaultdict(list)
    for number, stack in enumerate(stacks):
        for name, weight in stack:
            rows[name].append(number)
            weights[name].append(weight * scale)
    if not rows:
        raise InvalidRequestError(
            "no row names a set, so the width of the outputs is unknown; name at least one",
            field="sets",
        )
    return [Share(read(name), np.array(weights[name]), rows_of(rows[name])) for name in rows]


def stacked_shares(stored: StoredSet, stack: Stack, scale: float, read: Read) -> list[Share]:
    """Return the shares where all rows go through `stored` and the further sets of `stack`.

    `stored` has weight 1 unless `stack` names it. Raises SetNotFoundError.
    """
    own = stored.record.name
    weights = {own: 1.0} | dict(stack)
    return [
        Share(stored if name == own else read(name), weight * scale)
        for name, weight in weights.items()
    ]


def versions_of(shares: Sequence[Share]) -> dict[str, int]:
    """Return the version with which each set took part."""
    return {share.stored.record.name: share.stored.record.version for share in shares}


@dataclass(frozen=True, slots=True)
class Applier:
    """Applies adapters within `limits`; DoRA's row norms come from `bases`."""

    limits: Limits
    bases: BaseFolder

    def apply(
        self,
        shares: Sequence[Share],
        inputs: Inputs,
        base_outputs: Inputs,
        experts: Integers | None = None,
        match: str | None = None,
    ) -> dict[str, Floats]:
        """Return what the sets of `shares` add, by module, for inputs (d_in,) or (rows, d_in).

        `base_outputs` are W x without bias, for DoRA modules only; `experts` (rows,) says which of
        its fused experts each row goes through, for all such modules; `match` is the start of
        the names of the base's tensors whose norms DoRA needs. All is checked before anything is
        computed. Raises InvalidRequestError where there is no module at all,
        AdapterNotFoundError, ShapeMismatchError, TooManyRowsError, AnswerTooLargeError,
        DoraNeedsBaseError, and UnsupportedAdapterError for a module whose bias is replaced, or a
        DoRA module that is weighted or stacked.
        """
        if not inputs:
            raise InvalidRequestError("there are no inputs; give at least one module its vectors")
        adapters = {module: _adapters_of(module, shares, batch) for module, batch in inputs.items()}
        _check_any_experts(adapters, experts)
        for module, some in adapters.items():
            check_experts(module, some, experts, count_rows(inputs[module]))
        self.limits.check_rows(max(count_rows(one) for one in inputs.values()))
        values = sum(
            count_rows(inputs[module]) * some[0].d_out for module, some in adapters.items()
        )
        self.limits.check_answer(values)
        planned = {
            module: self._plan(
                module, shares, some, inputs[module], base_outputs.get(module), experts, match
            )
            for module, some in adapters.items()
        }
        return {module: compute() for module, compute in planned.items()}

    def _plan(
        self,
        module: str,
        shares: Sequence[Share],
        adapters: Sequence[LoraAdapter],
        x: Floats,
        base_outputs: Floats | None,
        experts: Integers | None,
        match: str | None,
    ) -> Callable[[], Floats]:
        """Return the computation for one module, with everything checked that can be refused."""
        is_dora = any(one.magnitude is not None for one in adapters)
        is_fused = any(one.experts is not None for one in adapters)
        if len(shares) == 1 and shares[0].rows is None and not (is_dora or is_fused):
            return partial(adapters[0].apply, x, shares[0].weights)
        d_out = adapters[0].d_out
        if is_dora:
            _check_dora(module, shares, adapters, count_rows(x))
            base_outputs = _check_base_outputs(module, base_outputs, (*x.shape[:-1], d_out))
        segments = [
            segment
            for share, adapter in zip(shares, adapters, strict=True)
            for segment in self._segments(
                module,
                share,
                adapter,
                None if base_outputs is None else base_outputs.reshape(count_rows(x), d_out),
                experts,
                match,
            )
        ]
        batch = x.reshape(count_rows(x), x.shape[-1])
        return lambda: apply_segments(batch, segments, d_out).reshape(*x.shape[:-1], d_out)

    def _segments(
        self,
        module: str,
        share: Share,
        adapter: LoraAdapter,
        base_outputs: Floats | None,
        experts: Integers | None,
        match: str | None,
    ) -> list[Segment]:
        """Return the rows of one share, by expert where the adapter is of fused experts."""
        if adapter.experts is not None and experts is not None:
            return expert_segments(adapter, share.places, share.weights, experts)
        if adapter.magnitude is None or base_outputs is None:
            return [Segment(adapter, share.places, share.weights)]
        norms = norms_of(share.stored, module, adapter, self.bases, match)
        return [Segment(adapter, share.places, share.weights, base_outputs, norms)]


def _check_any_experts(
    adapters: Mapping[str, Sequence[LoraAdapter]], experts: Integers | None
) -> None:
    if experts is not None and all(
        one.experts is None for some in adapters.values() for one in some
    ):
        raise InvalidRequestError(
            f"experts is given, but {', '.join(list(adapters)[:8])} are no fused experts; leave it "
            "out",
            field="experts",
        )


def check_experts(
    module: str, adapters: Sequence[LoraAdapter], experts: Integers | None, rows: int
) -> None:
    """Raise unless `experts` has a number for each row where an adapter is of fused experts.

    InvalidRequestError where they are missing or beyond the last expert, ShapeMismatchError where
    there are more or fewer than rows.
    """
    counts = [one.experts for one in adapters if one.experts is not None]
    if not counts:
        return
    if experts is None:
        raise InvalidRequestError(
            f"module {module!r} has {counts[0]} fused experts; send `experts` beside the inputs: "
            "for each row the number of its expert, from 0",
            module=module,
            field="experts",
        )
    if len(experts) != rows:
        raise ShapeMismatchError(
            f"there are {len(experts)} numbers in experts, but {rows} rows for {module!r}",
            module=module,
            got=len(experts),
            expected=rows,
        )
    wrong = np.flatnonzero((experts < 0) | (experts >= min(counts)))
    if wrong.size:
        raise InvalidRequestError(
            f"experts[{wrong[0]}] is {experts[wrong[0]]}, but {module!r} has {min(counts)} "
            f"experts: 0 to {min(counts) - 1}",
            module=module,
            row=int(wrong[0]),
            got=int(experts[wrong[0]]),
        )


def _adapters_of(module: str, shares: Sequence[Share], x: Floats) -> list[LoraAdapter]:
    """Return the adapter of each share; raises where one is not there or of another shape."""
    adapters = [get_adapter(share.stored, module) for share in shares]
    for share, adapter in zip(shares, adapters, strict=True):
        check_no_replaced_bias(share.stored, module)
        check_width(module, adapter, x)
        if adapter.d_out != adapters[0].d_out:
            raise ShapeMismatchError(
                f"set {share.stored.record.name!r} gives {module!r} outputs of width "
                f"{adapter.d_out}, but set {shares[0].stored.record.name!r} of width "
                f"{adapters[0].d_out}; the sets of one batch must be for one model",
                module=module,
                got=adapter.d_out,
                expected=adapters[0].d_out,
            )
    return adapters


def _check_dora(
    module: str, shares: Sequence[Share], adapters: Sequence[LoraAdapter], rows: int
) -> None:
    """Raise where a row goes through DoRA and something else, or through DoRA at a weight."""
    taking_part = np.zeros(rows, np.intp)
    for share in shares:
        taking_part[share.places] += 1
    for share, adapter in zip(shares, adapters, strict=True):
        if adapter.magnitude is None:
            continue
        if np.any(taking_part[share.places] > 1) or np.any(np.not_equal(share.weights, 1.0)):
            raise UnsupportedAdapterError(
                f"module {module!r} of set {share.stored.record.name!r} is DoRA, which scales the "
                "whole output, so it cannot be weighted or stacked with other sets",
                set=share.stored.record.name,
                module=module,
            )


def _check_base_outputs(module: str, given: Floats | None, expected: tuple[int, ...]) -> Floats:
    if given is None:
        raise DoraNeedsBaseError(
            f"module {module!r} is DoRA: its outputs need base_outputs (W·x without bias) "
            "beside the inputs",
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


def total_rows(inputs: Inputs) -> int:
    """Return the number of vectors in all batches."""
    return sum(count_rows(one) for one in inputs.values())


def cost_of_body(adapter: LoraAdapter, body_bytes: int, taken: Form, given: Form) -> float:
    """Return how many nanoseconds an apply takes, by estimate, before its body is decoded."""
    if adapter.d_in == 0 or (taken is Form.JSON and body_bytes > _MOST_JSON_BYTES):
        return math.inf
    values = body_bytes / (_JSON_BYTES if taken is Form.JSON else 4)
    return cost_of(adapter, max(1.0, values / adapter.d_in), taken, given)


def cost_of(adapter: LoraAdapter, rows: float, taken: Form, given: Form) -> float:
    """Return how many nanoseconds an apply takes, by estimate; infinite where a file is read first.

    Costs per number, measured here: 11 to read from JSON, 9 to write, 1 in binary; 0.02 per
    multiply-add in vectors, 0.65 in what is left of a width beyond whole vectors.
    """
    if adapter.magnitude is not None or not adapter.is_ready:
        return math.inf
    read = rows * adapter.d_in * (11 if taken is Form.JSON else 1)
    written = rows * adapter.d_out * (9 if given is Form.JSON else 1)
    left_over = adapter.d_in % 16 + adapter.d_out % 16
    added = (adapter.d_in + adapter.d_out) * 0.02 + left_over * 0.65
    return read + written + rows * adapter.rank * added
