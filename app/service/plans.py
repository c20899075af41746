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

from app.core.adapter import LoraAdapter, sums_may_overflow
from app.core.cast import FLOAT32, Floats, all_finite
from app.formats import safetensors
from app.service.apply import cost_of
from app.service.sets import get_adapter
from app.storage.counts import Counts
from app.storage.regions import SharedRegions
from app.storage.setfile import StoredSet
from app.wire.finite import check_finite
from app.wire.media import Form
from app.wire.oip import Placement
from app.wire.tensors import Buffer


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """Where the inputs of one module lie, and where its outputs go."""

    module: str
    name: str
    """What the client calls the inputs."""
    shape: tuple[int, ...]
    start: int = 0
    """Their first byte in the body."""
    placed: Placement | None = None
    """Or their place in shared memory."""
    answered: Placement | None = None
    """Where the outputs go, if not behind the answer's head."""

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What is left to do for a request."""

    steps: Sequence[tuple[Source, LoraAdapter]]
    weight: float
    body_bytes: int
    head: Buffer
    """The answer, up to its tensors."""
    rows: int
    cost: float
    """Nanoseconds that it takes, by estimate."""

    def run(self, body: Buffer, regions: SharedRegions, counts: Counts) -> list[Buffer]:
        """Return the answer to `body` in parts; outputs with a place go there.

        `counts` gets rows and times.

        Raises NonFiniteInputError, and the errors of `SharedRegions`, before anything is written.
        """
        started = time.perf_counter_ns()
        with sums_may_overflow():
            hidden = [self._down(body, regions, *step) for step in self.steps]
            ready = time.perf_counter_ns()
            weight = self.weight
            outputs = [
                adapter.up(one, weight)
                for (_, adapter), one in zip(self.steps, hidden, strict=True)
            ]
        computed = time.perf_counter_ns()
        parts: list[Buffer] = [self.head]
        for (source, _), array in zip(self.steps, outputs, strict=True):
            data = safetensors.as_bytes(array)
            if source.answered is not None:
                regions.write(source.answered, data)
            else:
                parts.append(data)
        counts.rows = self.rows
        counts.input_ns = ready - started
        counts.infer_ns = computed - ready
        counts.output_ns = time.perf_counter_ns() - computed
        return parts

    @staticmethod
    def _down(body: Buffer, regions: SharedRegions, source: Source, adapter: LoraAdapter) -> Floats:
        """Return the first half of an apply, of inputs that are all finite."""
        content, start = body, source.start
        if source.placed is not None:
            content, start = regions.read(source.placed), 0
        x = np.ndarray(source.shape, FLOAT32, content, start)
        hidden = adapter.down(x)
        # What is not finite stays so in each sum that it is part of, and this is far less to look
        # at than x. (A sum of finite numbers may overflow.)
        if not all_finite(hidden):
            check_finite(x, source.name)
        return hidden


def binary_sources(text: bytes, tensors: Mapping[str, str]) -> list[Source] | None:
    """Return the source of each module, from a checked safetensors header and tensors' names.

    None where one of them is not float32.
    """
    header = safetensors.decode_header(text)
    infos = {module: header.tensors[tensor] for module, tensor in tensors.items()}
    if any(one.dtype != "F32" for one in infos.values()):
        return None
    return [
        Source(module, tensors[module], one.shape, header.data_start + one.start)
        for module, one in infos.items()
    ]


def make_plan(
    stored: StoredSet,
    sources: Sequence[Source] | None,
    weight: float,
    body_bytes: int,
    head: Buffer,
) -> Plan | None:
    """Return the plan of a request that was just answered behind `head`; None where there is none.

    There is none for inputs that are not all float32, for DoRA, and for empty batches.
    """
    if not sources:
        return None
    steps = [(one, get_adapter(stored, one.module)) for one in sources]
    if any(adapter.magnitude is not None or 0 in one.shape for one, adapter in steps):
        return None
    cost = sum(cost_of(adapter, one.rows, Form.BINARY, Form.BINARY) for one, adapter in steps)
    return Plan(steps, weight, body_bytes, head, sum(one.rows for one in sources), cost)
