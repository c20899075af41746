"""The Open Inference Protocol v2, with Triton's extensions.

A set is a model; its version is the model's version. Errors are `{"error": …}` with Triton's
statuses (`app/bonsai_lora/api/errors.py`).
"""

import math
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version as package_version
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel

from bonsai_lora.api import oip_schemas
from bonsai_lora.api.body import check_length, parse_model, read_body
from bonsai_lora.api.call import BufferResponse, Call
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import CallDep, ContextDep
from bonsai_lora.api.json_response import json_response
from bonsai_lora.api.openapi import (
    empty_responses,
    oip_errors,
    request_body,
    tensor_responses,
)
from bonsai_lora.api.options import (
    HEADER_LENGTH,
    INFER_OPTIONS,
    InferOptions,
    parameters,
    read_options,
)
from bonsai_lora.errors import BonsaiLoraError, ForbiddenError, UnsupportedFeatureError
from bonsai_lora.service import models
from bonsai_lora.service.apply import Applier
from bonsai_lora.service.infer import Inference, cost_of_inference
from bonsai_lora.service.models import MIXED, MIXED_VERSION, Model, model_of, raw_request
from bonsai_lora.storage.counts import Counts
from bonsai_lora.storage.residency import resident_bytes
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.compress import MOST_EXPANSION, compress, decompress
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.oip import InferRequest, decode_request

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

INLINE_BYTES = 1 << 17
"""Longest JSON that is parsed on the event loop."""

_EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
)
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_MODEL = "/models/{model}"
_NUMBER = re.compile("[0-9]{1,16}")
_VERSION = "/models/{model}/versions/{version}"

ModelPath = Annotated[
    str, Path(description=f"name of a set, or {MIXED!r}", examples=["my-adapter"])
]


_VERSION_DESCRIPTION = "version that the set must have"
VersionPath = Annotated[str, Path(description=_VERSION_DESCRIPTION)]
_VERSION_PARAMETER = {
    "name": "version",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": _VERSION_DESCRIPTION,
}
"""For routes that have {version} in their path, but not in their signature."""

_INFER_EXTRA = request_body(
    oip_schemas.InferRequest,
    Form.RAW,
    example={
        "inputs": [
            {"name": "q_proj", "shape": [1, 4], "datatype": "FP32", "data": [0.5, -1.0, 2.0, 0.25]}
        ]
    },
) | {"parameters": parameters(INFER_OPTIONS)}
_INFER_RESPONSES = tensor_responses(oip_schemas.InferResponse, Form.RAW) | oip_errors(400, 404, 503)


async def _find_model(context: Context, name: str, version: str | None) -> Model:
    """Return a model; raises SetNotFoundError, VersionNotFoundError."""
    wanted = int(version) if version is not None and _NUMBER.fullmatch(version) else None
    return model_of(name, None if name == MIXED else await context.open(name, wanted), version)


async def _find(request: Request, context: ContextDep, model: ModelPath) -> Model:
    return await _find_model(context, model, request.path_params.get("version"))


ModelDep = Annotated[Model, Depends(_find)]


def _of_model(
    ending: str, what: str, summary: str, model: type[BaseModel]
) -> Callable[[Endpoint], Endpoint]:
    """Declare two GETs of a model: the current version, and one version (404 once replaced)."""

    def declare(endpoint: Endpoint) -> Endpoint:
        responses = oip_errors(404, 503)
        router.get(
            f"{_MODEL}{ending}",
            operation_id=f"get_model{what}",
            summary=summary,
            response_model=model,
            responses=responses,
        )(endpoint)
        return router.get(
            f"{_VERSION}{ending}",
            operation_id=f"get_model_version{what}",
            summary=f"{summary} (one version)",
            response_model=model,
            openapi_extra={"parameters": [_VERSION_PARAMETER]},
            responses=responses,
        )(endpoint)

    return declare


@router.get("", summary="Show the server's metadata")
@router.get("/", include_in_schema=False)
async def get_server(context: ContextDep) -> oip_schemas.ServerMetadata:
    """Returns the server's name, version and protocol extensions."""
    shared = ("system_shared_memory",) if context.regions.is_on else ()
    return oip_schemas.ServerMetadata(
        name="bonsai-lora",
        version=package_version("bonsai-lora"),
        extensions=[*_EXTENSIONS, *shared],
    )


@router.get("/health/live", summary="Is the server alive?")
async def get_server_live() -> oip_schemas.ServerLive:
    """Responds as long as the process is running."""
    return oip_schemas.ServerLive()


@router.get(
    "/health/ready",
    summary="Is the server ready?",
    responses=oip_errors(503),
)
async def get_server_ready(context: ContextDep) -> oip_schemas.ServerReady:
    """The server is ready from its first answer until it is about to stop."""
    context.check_ready()
    return oip_schemas.ServerReady()


@router.get(
    "/models/stats",
    summary="Show the statistics of all models",
    responses=oip_errors(503),
)
async def get_all_statistics(context: ContextDep) -> oip_schemas.ModelStatistics:
    """Totals over all workers since the service started; durations in nanoseconds."""
    return await anyio.to_thread.run_sync(_all_statistics, context)


@_of_model("", "", "Show a model's metadata", oip_schemas.ModelMetadata)
async def get_model(context: ContextDep, model: ModelDep) -> Response:
    """A model's inputs and outputs are named after its modules. The input `x` feeds every
    requested output that has no input of its own.
    """

    def describe() -> oip_schemas.ModelMetadata:
        return oip_schemas.ModelMetadata(
            name=model.name,
            versions=[model.version],
            platform=models.PLATFORM,
            inputs=[
                oip_schemas.TensorMetadata.model_validate(one) for one in models.inputs_of(model)
            ],
            outputs=[
                oip_schemas.TensorMetadata.model_validate(one) for one in models.outputs_of(model)
            ],
        )

    return await json_response(context, describe, len(model.adapters), {})


@_of_model("/ready", "_ready", "Is the model ready?", oip_schemas.ModelReady)
async def get_model_ready(model: ModelDep) -> oip_schemas.ModelReady:
    """Every set that exists is ready."""
    return oip_schemas.ModelReady(name=model.name)


@_of_model("/config", "_config", "Show a model's configuration", oip_schemas.ModelConfig)
async def get_model_config(context: ContextDep, model: ModelDep) -> Response:
    """Uses the fields of Triton's model configuration."""
    return await json_response(
        context, lambda: oip_schemas.ModelConfig(**models.config_of(model)), len(model.adapters), {}
    )


@_of_model("/stats", "_statistics", "Show a model's statistics", oip_schemas.ModelStatistics)
async def get_model_statistics(context: ContextDep, model: ModelDep) -> oip_schemas.ModelStatistics:
    """Totals over all workers since the service started or the set last changed; durations in
    nanoseconds.
    """
    if model.stored is None and not context.store.key.sees_all:
        raise ForbiddenError(
            f"the statistics of model {MIXED!r} cover the sets of all keys; use a key for all names"
        )
    return await anyio.to_thread.run_sync(
        _statistics, context, [(model.name, model.version, model.content)]
    )


@router.post(
    f"{_MODEL}/infer",
    summary="Run inference: apply a set to the inputs",
    response_class=Response,
    openapi_extra=_INFER_EXTRA,
    responses=_INFER_RESPONSES,
)
async def infer(call: CallDep, model: ModelPath) -> BufferResponse:
    """An input with the name of a module feeds that module and yields an output with that name.
    The input `x` feeds every module named in `outputs` (without `outputs`: every module whose width
    it matches). For fused experts, the INT32 or INT64 input `experts` is the number of the expert
    of each row. On the model `mixed`, the BYTES input `sets` names a set for each row. The
    parameter `scale` multiplies the whole delta. Binary data, compression and shared memory work as
    in Triton.
    """
    return await _infer(call, await _find_model(call.context, model, None))


@router.post(
    f"{_VERSION}/infer",
    summary="Run inference on one version of a set",
    response_class=Response,
    openapi_extra=_INFER_EXTRA,
    responses=_INFER_RESPONSES,
)
async def infer_version(call: CallDep, model: ModelPath, version: VersionPath) -> BufferResponse:
    """Like inference without a version, but 404 if the set has a different version now."""
    return await _infer(call, await _find_model(call.context, model, version))


async def _infer(call: Call, model: Model) -> BufferResponse:
    """Run an inference and count it in the statistics."""
    context = call.context
    options = read_options(call, INFER_OPTIONS, InferOptions.of)
    counts = Counts()
    started = time.perf_counter_ns()
    try:
        body = await call.body(context.limits.max_body_bytes)
        parts, length = await _run(call, model, body, options, counts)
    except BonsaiLoraError:
        failed = Counts(_now_ms(), fail_count=1, fail_ns=time.perf_counter_ns() - started)
        context.counts.add(*model.count_key, failed)
        raise
    counts.success_count, counts.success_ns = 1, time.perf_counter_ns() - started
    counts.last_ms = _now_ms()
    context.counts.add(*model.count_key, counts)
    call.count_rows(counts.vectors)
    headers = [] if length is None else [(HEADER_LENGTH, b"%d" % length)]
    if options.response_coding is not None:
        parts = [await context.short.run(compress, b"".join(parts), options.response_coding)]
        headers.append((b"content-encoding", options.response_coding.encode()))
    return BufferResponse(parts, Form.JSON if length is None else Form.RAW, headers)


@router.post(
    "/repository/index",
    summary="List all models",
    openapi_extra=request_body(oip_schemas.IndexRequest, required=False),
    responses=oip_errors(400, 503),
)
async def get_repository_index(
    request: Request, context: ContextDep
) -> list[oip_schemas.IndexEntry]:
    """Every set is ready; `reason` tells which ones are not in memory yet."""
    await _read_optional(request, oip_schemas.IndexRequest)
    found = await anyio.to_thread.run_sync(models.list_models, context.store)
    return [oip_schemas.IndexEntry(**one) for one in found]


@router.post(
    "/repository/models/{model}/load",
    summary="Load a set into memory",
    response_class=Response,
    openapi_extra=request_body(oip_schemas.RepositoryRequest, required=False),
    responses=empty_responses() | oip_errors(400, 404, 501, 503),
)
async def load_model(request: Request, context: ContextDep, model: ModelDep) -> Response:
    """Loads the set before its first request, and keeps its copy if the store is a bucket."""
    requested = await _read_optional(request, oip_schemas.RepositoryRequest)
    if requested.parameters:
        names = ", ".join(sorted(requested.parameters))[:200]
        raise UnsupportedFeatureError(
            f"load does not support the parameters {names}; upload an adapter with "
            "PUT /v1/sets/{set}"
        )
    if model.stored is not None:
        with context.long.admit():
            await context.long.run(models.load, model.stored)
            await context.long.run(context.store.keep, model.name)
    return Response()


@router.post(
    "/repository/models/{model}/unload",
    summary="Release a set's memory",
    response_class=Response,
    openapi_extra=request_body(oip_schemas.RepositoryRequest, required=False),
    responses=empty_responses() | oip_errors(400, 404, 503),
)
async def unload_model(request: Request, context: ContextDep, model: ModelDep) -> Response:
    """The set stays in the store, and is opened again on its next use."""
    await _read_optional(request, oip_schemas.RepositoryRequest)
    await context.long.run(context.store.release, model.name)
    return Response()


async def _run(
    call: Call, model: Model, body: Buffer, options: InferOptions, counts: Counts
) -> tuple[list[Buffer], int | None]:
    """Decode and infer, on the event loop if the estimated work is small, else in a thread."""
    context, limits = call.context, call.context.limits
    header_length, coding = options.header_length, options.request_coding
    text_length = len(body) if header_length is None else header_length

    def decode(*, may_take_long: bool) -> InferRequest:
        plain = body
        if coding:
            call.reserve(min(MOST_EXPANSION * len(body), limits.max_body_bytes))
            plain = decompress(body, coding, limits.max_body_bytes)
        check_length(len(plain) if header_length is None else header_length, limits.max_json_bytes)
        if header_length == 0:
            return raw_request(model, memoryview(plain))
        return decode_request(memoryview(plain), header_length, may_take_long=may_take_long)

    requested = None
    if coding is None and text_length <= INLINE_BYTES:
        requested = _timed(partial(decode, may_take_long=True), counts)
    queued = time.perf_counter_ns()

    def work(applier: Applier) -> tuple[list[Buffer], int | None]:
        counts.queue_ns = time.perf_counter_ns() - queued
        decode_it = partial(decode, may_take_long=applier.may_take_long)
        request = requested or _timed(decode_it, counts)
        # The outputs' form is known to `infer` only, so count those in JSON.
        reserve = call.reserve_outputs(Form.BINARY if request.is_binary else Form.JSON)
        inference = Inference(context.store, context.regions, applier)
        return inference.infer(model, request, counts, reserve)

    return await context.apply(work, cost_of_inference(model, requested) if requested else math.inf)


def _timed(decode: Callable[[], InferRequest], counts: Counts) -> InferRequest:
    """Return the result of `decode`; add its duration to `counts`."""
    started = time.perf_counter_ns()
    requested = decode()
    counts.input_ns += time.perf_counter_ns() - started
    return requested


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def _read_optional(request: Request, model: type[BaseModel]) -> Any:
    body = await read_body(request, 1 << 20)
    return parse_model(body, model) if body.strip() else model()


def _all_statistics(context: Context) -> oip_schemas.ModelStatistics:
    records = context.store.records()
    found = [(one.name, str(one.version), one.etag) for one in records]
    mixed = [(MIXED, MIXED_VERSION, MIXED)] if context.store.key.sees_all else []
    return _statistics(context, [*found, *mixed])


def _statistics(context: Context, found: list[tuple[str, str, str]]) -> oip_schemas.ModelStatistics:
    memory = {one.record.name: resident_bytes(one.file) for one in context.store.open_sets()}
    return oip_schemas.ModelStatistics(
        model_stats=models.statistics_of(context.counts, found, memory)
    )
