"""Sets as models of the Open Inference Protocol: look-up, raw input, metadata, statistics."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.errors import InvalidRequestError, VersionNotFoundError, counted
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.counts import CountFile, Counts
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.binary import EXPERTS
from bonsai_lora.wire.oip import InferInput, InferRequest
from bonsai_lora.wire.stacks import SETS
from bonsai_lora.wire.tensors import BASE_ENDING

PLATFORM = "bonsai_lora"
MIXED = "mixed"
"""The model whose input `sets` names a set for each row."""
MIXED_VERSION = "1"
SHARED_INPUT = "x"
"""The input that feeds each requested output without an input of its own."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model: the current version of a set, or the mixed model, whose `stored` is None."""

    name: str
    stored: StoredSet | None

    @property
    def adapters(self) -> Mapping[str, LoraAdapter]:
        """Adapters by module; empty for the mixed model."""
        return {} if self.stored is None else self.stored.lora_set.registry.adapters

    @property
    def version(self) -> str:
        """The set's version as a string."""
        return MIXED_VERSION if self.stored is None else str(self.stored.record.version)

    @property
    def content(self) -> str:
        """A tag that changes whenever the model's outputs may change."""
        return MIXED if self.stored is None else self.stored.record.etag

    @property
    def count_key(self) -> tuple[str, str, str]:
        """Name, content tag and time of the last change, under which inferences are counted."""
        return self.name, self.content, "" if self.stored is None else self.stored.record.updated_at


def model_of(name: str, stored: StoredSet | None, version: str | None) -> Model:
    """Return the model of a set, or the mixed one; raises VersionNotFoundError."""
    model = Model(name, stored)
    if version is not None and version != model.version:
        raise VersionNotFoundError(
            f"Request for unknown model: '{name}' version {version[:20]} is not found; request "
            f"version {model.version}, or none",
            model=name,
            got=version[:20],
            expected=model.version,
        )
    return model


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a model; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


def inputs_of(model: Model) -> list[Tensor]:
    """Return a model's inputs: its modules, `x`, which feeds all of them, and `experts`."""
    shared = Tensor(SHARED_INPUT, "FP32", [-1, -1])
    if model.stored is None:
        return [Tensor(SETS, "BYTES", [-1]), shared]
    adapters = model.adapters
    own = [Tensor(name, "FP32", [-1, one.d_in]) for name, one in adapters.items()]
    own += [
        Tensor(f"{name}{BASE_ENDING}", "FP32", [-1, one.d_out])
        for name, one in adapters.items()
        if one.magnitude is not None
    ]
    has_experts = any(one.experts is not None for one in adapters.values())
    if has_experts and EXPERTS not in adapters:
        own.append(Tensor(EXPERTS, "INT64", [-1]))
    return own if SHARED_INPUT in adapters else [*own, shared]


def outputs_of(model: Model) -> list[Tensor]:
    """Return a model's outputs: its modules. The mixed model's depend on the requested sets."""
    return [Tensor(name, "FP32", [-1, one.d_out]) for name, one in model.adapters.items()]


def raw_request(model: Model, body: memoryview) -> InferRequest:
    """Return the request of a raw body: nothing but the FP32 data of one input.

    The input is the set's only module, or `x` if all its modules have the same width. All outputs
    are requested, in binary. Raises InvalidRequestError for other models or lengths.
    """
    adapters = model.adapters
    widths = {one.d_in for one in adapters.values()}
    if model.stored is None:
        raise InvalidRequestError(
            f"model '{MIXED}' needs the input '{SETS}' besides raw input; send a JSON header that "
            "names both"
        )
    if len(widths) != 1 or widths == {0}:
        raise InvalidRequestError(
            f"raw input requires a model with one input width, but '{model.name}' has "
            f"{len(widths)}; send a JSON header that names its inputs"
        )
    (width,) = widths
    if len(body) % (4 * width):
        raise InvalidRequestError(
            f"raw input has {counted(len(body), 'byte')}, which is not a whole number of rows; "
            f"expected FP32 rows of width {width} ({4 * width} bytes each)"
        )
    name = next(iter(adapters)) if len(adapters) == 1 else SHARED_INPUT
    tensor = InferInput(name, "FP32", (len(body) // (4 * width), width), body)
    return InferRequest("", {name: tensor}, None, is_binary=True)


def config_of(model: Model) -> dict[str, Any]:
    """Return a model's configuration with the fields of Triton's model_config.proto."""

    def tensor(one: Tensor) -> dict[str, Any]:
        kind = "STRING" if one.datatype == "BYTES" else one.datatype
        return {"name": one.name, "data_type": f"TYPE_{kind}", "dims": one.shape}

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [
            {**tensor(one), "format": "FORMAT_NONE", "optional": one.name != SETS}
            for one in inputs_of(model)
        ],
        "output": [{**tensor(one), "label_filename": ""} for one in outputs_of(model)],
        "instance_group": [{"name": model.name, "kind": "KIND_CPU", "count": 1}],
        "parameters": {},
        "model_transaction_policy": {"decoupled": False},
    }


def list_models(store: SetView) -> list[dict[str, str]]:
    """Return the repository index: every set is ready, even if it is not in memory yet."""
    in_memory = {one.record.name for one in store.open_sets()}
    sets = [
        {
            "name": record.name,
            "version": str(record.version),
            "state": "READY",
            "reason": "" if record.name in in_memory else "on disk, opened on first use",
        }
        for record in store.records()
    ]
    return [*sets, {"name": MIXED, "version": MIXED_VERSION, "state": "READY", "reason": ""}]


def load(stored: StoredSet) -> None:
    """Read a set's file into the page cache, and prepare its adapters."""
    np.add.reduce(np.frombuffer(stored.file, np.uint8)[:: mmap.PAGESIZE])  # a byte of each page
    for adapter in stored.lora_set.registry.adapters.values():
        adapter.make_ready()


def statistics_of(
    counts: CountFile, models: Sequence[tuple[str, str, str]], memory: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return Triton's statistics of models, each given as name, version and content tag.

    `memory` has the resident bytes of the models that this process has open.
    """
    found = counts.read({name: content for name, _, content in models})
    return [
        {"name": name, "version": version, **_statistics(found[name], memory.get(name))}
        for name, version, _ in models
    ]


def _statistics(counts: Counts, memory_bytes: int | None) -> dict[str, Any]:
    done = counts.success_count

    def duration(count: int, nanoseconds: int) -> dict[str, int]:
        return {"count": count, "ns": nanoseconds}

    return {
        "last_inference": counts.last_ms,
        "inference_count": counts.rows,
        "execution_count": done,
        "inference_stats": {
            "success": duration(done, counts.success_ns),
            "fail": duration(counts.fail_count, counts.fail_ns),
            "queue": duration(done, counts.queue_ns),
            "compute_input": duration(done, counts.input_ns),
            "compute_infer": duration(done, counts.infer_ns),
            "compute_output": duration(done, counts.output_ns),
            "cache_hit": duration(0, 0),
            "cache_miss": duration(0, 0),
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": []
        if memory_bytes is None
        else [{"type": "CPU", "id": 0, "byte_size": memory_bytes}],
    }
