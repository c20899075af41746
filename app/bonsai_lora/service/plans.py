"""Requests of one form to one version of a set, with all checked that their form decides.

Clients send the same names, shapes and dtypes again and again; only the numbers differ. The first
request of a form takes the ordinary way. What that found is remembered with the set, so that the
next ones check their numbers, compute, and answer behind the same head: half of the time of a
request of one row (docs/decisions/0014-plans.md).
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import FLOAT32, Floats
from bonsai_lora.core.json_numbers import list_of
from bonsai_lora.formats import safetensors
from bonsai_lora.service.apply import cost_of
from bonsai_lora.service.sets import get_adapter
from bonsai_lora.service.work import AT_ONCE_NANOSECONDS
from bonsai_lora.storage.counts import Counts
from bonsai_lora.storage.regions import SharedRegions
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire import json
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.finite import check_finite
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.oip import Placement
from bonsai_lora.wire.tensors import INPUTS, check_json_output

PLANNED_JSON_BYTES = 1 << 17
"""Longest JSON that is planned: of longer ones the numbers take most of the time."""
_MODULE_NANOSECONDS = 10_000
"""What each module of a plan costs, however small."""


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """Where inputs lie."""

    name: str
    """What the client calls them."""
    shape: tuple[int, ...]
    start: int = 0
    """Their first byte in the body."""
    place: Placement | None = None
    """Or their place in shared memory."""
    number: int | None = None
    """Or which of the lists in JSON they are."""

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return math.prod(self.shape[:-1])

    def read(self, body: Buffer, lists: Sequence[Floats], regions: SharedRegions) -> Floats:
        """Return the inputs, not checked."""
        if self.number is not None:
            return lists[self.number].reshape(self.shape)
        if self.place is None:
            return np.ndarray(self.shape, FLOAT32, body, self.start)
        return np.ndarray(self.shape, FLOAT32, regions.read(self.place))


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """A module that some inputs go through."""

    module: str
    source: int
    """Number of its inputs among the sources."""
    place: Placement | None = None
    """Where its outputs go, if not behind the answer's head."""


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What is left to do for a request."""

    sources: Sequence[Source]
    steps: Sequence[Step]
    adapters: Sequence[LoraAdapter]
    """Of the steps."""
    weight: float
    body_bytes: int
    """For binary."""
    text: Sequence[Buffer]
    """The answer: all of it before binary tensors; for JSON, what is around each list."""
    is_json: bool
    is_flat: bool
    """Whether JSON has a batch as one list."""
    rows: int
    """What `Counts.rows` says of it."""
    cost: float
    """Nanoseconds that it takes, by estimate."""

    def run(
        self, body: Buffer, lists: Sequence[Floats], regions: SharedRegions, counts: Counts
    ) -> list[Buffer]:
        """Return the answer to `body`, or to its `lists`, in parts; outputs with a place go there.

        `counts` gets rows and times. Raises NonFiniteInputError, NonFiniteOutputError, and the
        errors of `SharedRegions`, before anything is written.
        """
        started = time.perf_counter_ns()
        inputs = [source.read(body, lists, regions) for source in self.sources]
        ready = time.perf_counter_ns()
        outputs = self._apply(inputs)
        computed = time.perf_counter_ns()
        parts = self._json(outputs) if self.is_json else self._binary(outputs, regions)
        counts.rows = self.rows
        counts.vectors = sum([self.sources[step.source].rows for step in self.steps])
        counts.input_ns = ready - started
        counts.infer_ns = computed - ready
        counts.output_ns = time.perf_counter_ns() - computed
        return parts

    def _binary(self, outputs: Sequence[Floats], regions: SharedRegions) -> list[Buffer]:
        parts = [*self.text]
        for step, array in zip(self.steps, outputs, strict=True):
            data = safetensors.as_bytes(array)
            if step.place is None:
                parts.append(data)
            else:
                regions.write(step.place, data)
        return parts

    def _json(self, outputs: Sequence[Floats]) -> list[Buffer]:
        parts = [*self.text[:1]]
        for step, array, text in zip(self.steps, outputs, self.text[1:], strict=True):
            check_json_output(step.module, array)
            parts += (list_of(array.reshape(-1) if self.is_flat else array), text)
        return parts

    def _apply(self, inputs: Sequence[Floats]) -> list[Floats]:
        """Return the outputs of all steps; raises NonFiniteInputError."""
        made = []
        for step, adapter in zip(self.steps, self.adapters, strict=True):
            outputs, is_finite = adapter.apply_checked(inputs[step.source], self.weight)
            # What is not finite stays so in each sum that it is part of, and this is far less to
            # look at than the inputs. (A sum of finite numbers may overflow.)
            if not is_finite:
                check_finite(inputs[step.source], self.sources[step.source].name)
            made.append(outputs)
        return made


def binary_sources(
    text: bytes, tensors: Mapping[str, str]
) -> tuple[list[Source], list[Step]] | None:
    """Return the sources and steps that a checked safetensors header describes.

    `tensors` names the inputs of each module. None where one of them is not float32.
    """
    header = safetensors.decode_header(text)
    names = list(dict.fromkeys(tensors.values()))
    infos = [header.tensors[name] for name in names]
    if any(one.dtype != "F32" for one in infos):
        return None
    sources = [
        Source(name, one.shape, header.data_start + one.start)
        for name, one in zip(names, infos, strict=True)
    ]
    return sources, [Step(module, names.index(tensor)) for module, tensor in tensors.items()]


def json_sources(
    taken: json.Taken, tensors: Mapping[str, str]
) -> tuple[list[Source], list[Step]] | None:
    """Return the sources and steps that a body in JSON describes, whose lists were taken out.

    `tensors` names the inputs of each module; INPUTS for what all of them share. None where one of
    them is no list that was taken out.
    """
    if not taken.arrays:
        return None
    inputs = json.decode(taken.text)[INPUTS]
    numbers = {
        tensor: json.hole_of(inputs if tensor == INPUTS else inputs.get(tensor))
        for tensor in tensors.values()
    }
    found = {name: number for name, number in numbers.items() if number is not None}
    if len(found) < len(numbers):
        return None
    sources = [
        Source(name, taken.arrays[number].shape, number=number) for name, number in found.items()
    ]
    names = list(found)
    return sources, [Step(module, names.index(tensor)) for module, tensor in tensors.items()]


def make_plan(
    stored: StoredSet,
    sources: Sequence[Source],
    steps: Sequence[Step],
    weight: float,
    *,
    body_bytes: int,
    parts: Sequence[Buffer],
    rows: int,
    form: Form = Form.BINARY,
    is_flat: bool = False,
) -> Plan | None:
    """Return the plan of a request that was just answered by `parts`; None where there is none.

    There is none for DoRA, fused experts and empty batches, nor for so much JSON that there is
    little to gain. Nor where A has no numbers: a product with that does not show what is not
    finite.
    """
    adapters = [get_adapter(stored, step.module) for step in steps]
    if any(one.magnitude is not None or one.experts is not None for one in adapters):
        return None
    if any(one.a_matrix.size == 0 for one in adapters):
        return None
    if any(0 in one.shape for one in sources):
        return None
    cost = sum(
        _MODULE_NANOSECONDS + cost_of(adapter, sources[step.source].rows, form, form)
        for step, adapter in zip(steps, adapters, strict=True)
    )
    is_json = form is Form.JSON
    if is_json and cost > AT_ONCE_NANOSECONDS:
        return None
    text = parts[::2] if is_json else parts[:1]
    return Plan(sources, steps, adapters, weight, body_bytes, text, is_json, is_flat, rows, cost)
