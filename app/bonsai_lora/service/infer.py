"""Inference with sets as models of the Open Inference Protocol."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from bonsai_lora.core.batch import Integers
from bonsai_lora.core.cast import Array, Floats, count_rows
from bonsai_lora.errors import InvalidRequestError, ShapeMismatchError, counted
from bonsai_lora.formats.safetensors import as_bytes
from bonsai_lora.service.adapters import get_adapter
from bonsai_lora.service.apply import (
    Applier,
    Inputs,
    Reserve,
    SetSegment,
    cost_of,
    group_by_set,
    total_rows,
)
from bonsai_lora.service.models import MIXED, SHARED_INPUT, Model
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.counts import Counts
from bonsai_lora.storage.regions import SharedRegions, Span
from bonsai_lora.wire import json
from bonsai_lora.wire.binary import EXPERTS
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.oip import (
    Encoded,
    InferInput,
    InferOutput,
    InferRequest,
    Placement,
    encode_response,
)
from bonsai_lora.wire.oip_tensors import (
    DATATYPES,
    check_floats,
    decode_floats,
    decode_integers,
    decode_strings,
    format_shape,
)
from bonsai_lora.wire.stacks import SETS, Stack, decode_row
from bonsai_lora.wire.tensors import BASE_ENDING, Batches

MODULE_NANOSECONDS = 30_000
"""Fixed cost of each module in a request."""


@dataclass(frozen=True, slots=True)
class Inference:
    """Runs inference requests of one caller."""

    store: SetView
    regions: SharedRegions
    applier: Applier

    def infer(
        self, model: Model, request: InferRequest, counts: Counts, reserve: Reserve
    ) -> Encoded:
        """Return the response body, and the length of its JSON if binary data follows.

        Outputs in shared memory are written there; rows and durations are added to `counts`.
        Raises the errors of `Applier.apply`, of bonsai_lora.wire.oip and of `SharedRegions`. The
        locations of outputs are checked before anything is computed.
        """
        started = time.perf_counter_ns()
        outputs, inputs, compute = self._plan(model, request, reserve)
        ready = time.perf_counter_ns()
        arrays = compute()
        computed = time.perf_counter_ns()
        answers = [(one, arrays[one.name]) for one in outputs]
        encoded = encode_response(model.name, model.version, request.id, answers)
        for one, array in answers:  # last, when nothing can fail any more
            if one.placed is not None:
                self.regions.write(one.placed, as_bytes(array))
        counts.rows = max(count_rows(one) for one in inputs.values())
        counts.vectors = total_rows(inputs)
        counts.input_ns += ready - started
        counts.infer_ns += computed - ready
        counts.output_ns += time.perf_counter_ns() - computed
        return encoded

    def _plan(
        self, model: Model, request: InferRequest, reserve: Reserve
    ) -> tuple[Sequence[InferOutput], Inputs, Callable[[], dict[str, Floats]]]:
        """Return the requested outputs, their inputs by module, and the computation."""
        tensors = _Tensors(request, self.regions)
        placed = [one.content for one in request.inputs.values()]
        sizes = [one.byte_size for one in placed if isinstance(one, Placement)]
        self.applier.limits.check_region_bytes(sum(sizes))
        experts, request = _take_experts(model, request, tensors)
        set_segments = (
            self._mixed_segments(request, tensors)
            if model.stored is None
            else [SetSegment(model.stored, request.scale)]
        )
        outputs = _outputs_of(model, request)
        sources = {one.name: _source(request, one.name) for one in outputs}
        for name, source in sources.items():
            adapter = get_adapter(set_segments[0].stored, name)
            _check_width(model, source, adapter.d_in)
        self._check_places(outputs, set_segments, sources)
        for source in sources.values():
            self.applier.limits.check_rows(source.rows)
            check_floats(source)
        inputs = {name: tensors.floats(source) for name, source in sources.items()}
        endings = {name: f"{name}{BASE_ENDING}" for name in inputs}
        base_outputs = {
            name: tensors.floats(request.inputs[ending])
            for name, ending in endings.items()
            if ending in request.inputs
        }
        batches = Batches(inputs, base_outputs, experts=experts)
        return (
            outputs,
            inputs,
            lambda: self.applier.apply(set_segments, batches, reserve=reserve),
        )

    def _mixed_segments(self, request: InferRequest, tensors: "_Tensors") -> list[SetSegment]:
        sets = request.inputs.get(SETS)
        if sets is None:
            raise InvalidRequestError(
                f"model '{MIXED}' has no input '{SETS}'; send one set's name per row, as BYTES",
                field=SETS,
            )
        self.applier.limits.check_rows(sets.shape[0] if sets.shape else 0)
        stacks = [_stack_of(text, row) for row, text in enumerate(tensors.strings(sets))]
        for one in request.inputs.values():
            if one is not sets and one.rows != len(stacks):
                raise ShapeMismatchError(
                    f"input '{one.name}' has {counted(one.rows, 'row')}, but '{SETS}' has "
                    f"{len(stacks)}; send as many rows in each",
                    field=one.name,
                    got=one.rows,
                    expected=len(stacks),
                )
        read = self.store.reader(may_take_long=self.applier.may_take_long)
        return group_by_set(stacks, request.scale, read)

    def _check_places(
        self,
        outputs: Sequence[InferOutput],
        set_segments: Sequence[SetSegment],
        sources: Mapping[str, InferInput],
    ) -> None:
        """Raise InvalidRequestError if outputs do not fit in shared memory, or overlap there."""
        spans: list[tuple[Span, str]] = []
        for one in outputs:
            if one.placed is None:
                continue
            needed = (
                4 * sources[one.name].rows * get_adapter(set_segments[0].stored, one.name).d_out
            )
            if one.placed.byte_size < needed:
                raise InvalidRequestError(
                    f"shared memory size specified with the request for output '{one.name}' "
                    f"({one.placed.byte_size} bytes) should be at least {needed} bytes to hold the "
                    "results",
                    field=one.name,
                )
            spans.append((self.regions.span_to_write(one.placed, needed), one.name))
        spans.sort(key=lambda pair: (pair[0].identity, pair[0].start))
        for (span, name), (following, other) in pairwise(spans):
            if span.overlaps(following):
                raise InvalidRequestError(
                    f"outputs '{name}' and '{other}' overlap in shared memory; place them apart",
                    field=name,
                )


def cost_of_inference(model: Model, request: InferRequest) -> float:
    """Estimate the nanoseconds of a request; infinite if they are unknown."""
    if model.stored is None:
        return math.inf
    if request.outputs is None:
        if SHARED_INPUT in request.inputs and SHARED_INPUT not in model.adapters:
            return math.inf  # every module whose width matches
        outputs = [InferOutput(name, request.is_binary) for name in request.inputs]
    else:
        outputs = list(request.outputs)
    cost = 0.0
    for one in outputs:
        source = _find_source(request, one.name)
        adapter = model.adapters.get(one.name)
        if source is not None and adapter is not None:
            request_form = (
                Form.JSON if isinstance(source.content, list | np.ndarray) else Form.BINARY
            )
            response_form = Form.BINARY if one.is_binary or one.placed else Form.JSON
            cost += MODULE_NANOSECONDS + cost_of(adapter, source.rows, request_form, response_form)
    return cost


class _Tensors:
    """The inputs of a request as arrays, each decoded once."""

    def __init__(self, request: InferRequest, regions: SharedRegions) -> None:
        self._text = request.text
        self._regions = regions
        self._known: dict[str, Floats] = {}

    def floats(self, tensor: InferInput) -> Floats:
        """Return a float tensor as float32."""
        known = self._known.get(tensor.name)
        if known is None:
            known = decode_floats(tensor, self._content(tensor))
            self._known[tensor.name] = known
        return known

    def integers(self, tensor: InferInput) -> Integers:
        """Return the tensor `experts`."""
        return decode_integers(tensor, self._content(tensor), self._text)

    def strings(self, tensor: InferInput) -> list[str]:
        """Return the strings of a BYTES tensor."""
        return decode_strings(tensor, self._content(tensor))

    def _content(self, tensor: InferInput) -> memoryview | Array | list[Any]:
        if isinstance(tensor.content, Placement):
            return self._regions.read(tensor.content)
        assert not isinstance(tensor.content, int), "decode_request has sliced the binary data"
        return tensor.content


def _take_experts(
    model: Model, request: InferRequest, tensors: _Tensors
) -> tuple[Integers | None, InferRequest]:
    """Return the expert of each row, None if there are none, and the request without them."""
    given = request.inputs.get(EXPERTS)
    if given is None:
        return None, request
    # Floats may be for a module with that name; the mixed model may have any.
    may_be_module = model.stored is None or EXPERTS in model.adapters
    if may_be_module and given.datatype in DATATYPES:
        return None, request
    others = {name: one for name, one in request.inputs.items() if one is not given}
    return tensors.integers(given), replace(request, inputs=others)


def _outputs_of(model: Model, request: InferRequest) -> Sequence[InferOutput]:
    """Return the requested outputs, or all that the inputs feed if none is named.

    Raises InvalidRequestError for inputs and outputs that the model does not have, and for inputs
    that feed no output.
    """
    requested = request.outputs
    if requested is None:
        requested = [
            InferOutput(name, request.is_binary) for name in _default_outputs(model, request)
        ]
    if not requested:
        raise InvalidRequestError(_no_outputs(model, request))
    names = {one.name for one in requested}
    if len(names) != len(requested):
        raise InvalidRequestError(
            "'outputs' names an output twice; name each once", field="outputs"
        )
    if model.stored is not None:
        _check_known(model, request.inputs, names)
    _check_all_feed(request, names, aside={SETS} if model.stored is None else set())
    return requested


def _check_known(model: Model, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    for name in inputs:
        if name != SHARED_INPUT and name.removesuffix(BASE_ENDING) not in model.adapters:
            raise InvalidRequestError(
                f"unexpected inference input '{name}' for model '{model.name}'; expected "
                f"'{SHARED_INPUT}' for all outputs, or one of its {_list_modules(model)}",
                field=name,
            )
    for name in outputs:
        if name not in model.adapters:
            raise InvalidRequestError(
                f"unexpected inference output '{name}' for model '{model.name}'; expected one of "
                f"its {_list_modules(model)}",
                field=name,
            )


def _check_all_feed(
    request: InferRequest, outputs: AbstractSet[str], *, aside: AbstractSet[str]
) -> None:
    """Raise for an input that feeds no output: it may be misspelled, or its output forgotten."""
    fed = {_source(request, name).name for name in outputs}
    fed |= aside | {f"{name}{BASE_ENDING}" for name in outputs}
    for name in request.inputs:
        if name not in fed:
            raise InvalidRequestError(
                f"input '{name}' feeds none of the outputs {', '.join(sorted(outputs)[:8])}; "
                "remove it, or request its output",
                field=name,
            )


def _default_outputs(model: Model, request: InferRequest) -> list[str]:
    """Return the modules with an input of their own, then those that the shared one fits."""
    has_shared = SHARED_INPUT in request.inputs and SHARED_INPUT not in model.adapters
    aside = {SHARED_INPUT} if has_shared else set()
    if model.stored is None:
        aside.add(SETS)
    named = [name for name in request.inputs if not name.endswith(BASE_ENDING)]
    own = [name for name in named if name not in aside]
    if not has_shared:
        return own
    width = request.inputs[SHARED_INPUT].shape[-1:]
    fitting = [name for name, one in model.adapters.items() if width == (one.d_in,)]
    fed = set(own)
    return [*own, *(name for name in fitting if name not in fed)]


def _list_modules(model: Model) -> str:
    names = list(model.adapters)
    return (
        f"{counted(len(names), 'module')}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
    )


def _no_outputs(model: Model, request: InferRequest) -> str:
    """Return the error text for a request that yields no output."""
    shared = request.inputs.get(SHARED_INPUT)
    if model.stored is None:
        return (
            f"the request to model '{MIXED}' names no module; name the input after the module, or "
            "name the outputs"
        )
    if shared is None:
        more = f" (besides '{next(iter(request.inputs))}')" if request.inputs else ""
        return (
            f"the request has no input for model '{model.name}'{more}; send one of its modules, "
            f"or '{SHARED_INPUT}'"
        )
    widths = sorted({one.d_in for one in model.adapters.values()})
    return (
        f"unexpected shape for input '{SHARED_INPUT}' for model '{model.name}'. Expected "
        f"[-1,{' or '.join(map(str, widths[:8]))}], got {format_shape(shared.shape)}"
    )


def _source(request: InferRequest, output: str) -> InferInput:
    """Return the input that feeds an output: the one with its name, else the shared one."""
    source = _find_source(request, output)
    if source is None:
        raise InvalidRequestError(
            f"output '{output}' has no input; send '{output}' or '{SHARED_INPUT}'", field=output
        )
    return source


def _find_source(request: InferRequest, output: str) -> InferInput | None:
    return request.inputs.get(output) or request.inputs.get(SHARED_INPUT)


def _check_width(model: Model, source: InferInput, d_in: int) -> None:
    if len(source.shape) not in (1, 2) or source.shape[-1] != d_in:
        raise ShapeMismatchError(
            f"unexpected shape for input '{source.name}' for model '{model.name}'. Expected "
            f"[-1,{d_in}], got {format_shape(source.shape)}",
            field=source.name,
            got=list(source.shape),
            expected=[-1, d_in],
        )


def _stack_of(text: str, row: int) -> Stack:
    """Return the stack of a row, given as a set's name, nothing, or JSON with weighted sets."""
    if not text:
        return ()
    where = f"{SETS}[{row}]"
    value = json.decode(text.encode(), where) if text[0] in "[{" else text
    return decode_row(value, where)
