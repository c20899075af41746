"""Apply adapters to batches of vectors."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Response

from bonsai_lora import errors
from bonsai_lora.api import tensor_schemas
from bonsai_lora.api.call import BufferResponse, Call
from bonsai_lora.api.context import checked_version
from bonsai_lora.api.deps import CallDep, ModuleName, SetName
from bonsai_lora.api.openapi import APPLY_ERRORS, problems, request_body, tensor_responses
from bonsai_lora.api.options import (
    APPLY_MANY_OPTIONS,
    APPLY_ONE_OPTIONS,
    APPLY_OPTIONS,
    ApplyOptions,
    parameters,
    read_options,
    version_hint,
)
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats
from bonsai_lora.service.adapters import get_adapter
from bonsai_lora.service.apply import (
    Applier,
    SetSegment,
    cost_of_body,
    group_by_set,
    stack_on,
    total_rows,
    versions_of,
)
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.tensors import (
    Batches,
    decode_many,
    decode_mixed,
    decode_one,
    encode_outputs,
)

router = APIRouter(tags=["apply"])

ResponseFields = dict[str, Any]
"""Fields of a response besides its tensors."""


@router.post(
    "/v1/sets/{set}/adapters/{module}/apply",
    operation_id="apply_adapter",
    summary="Apply one adapter to a batch of vectors",
    response_class=Response,
    openapi_extra=request_body(
        tensor_schemas.ApplyRequest, Form.BINARY, example={"inputs": [[0.5, -1.0, 2.0, 0.25]]}
    )
    | {"parameters": parameters(APPLY_ONE_OPTIONS)},
    responses=tensor_responses(tensor_schemas.ApplyAnswer, Form.BINARY)
    | problems(*APPLY_ERRORS, errors.VersionNotFoundError),
)
async def apply_one(call: CallDep, name: SetName, module: ModuleName) -> BufferResponse:
    """Returns scaling · B·A·x for each row x, to be added to the base layer's output. A binary
    request is a safetensors body with the tensor `inputs`; the response has the tensor `outputs`.
    `sets` adds the deltas of more sets, each with a weight (in binary: as JSON in the metadata).
    Include the path's own set to give it a weight too. For fused experts, `experts` (in binary: an
    I32 or I64 tensor) is the number of the expert of each row.
    """
    context = call.context
    stored = await context.open(name, version_hint(call.query_string))
    adapter = get_adapter(stored, module)
    options = read_options(call, APPLY_ONE_OPTIONS, ApplyOptions.of)
    checked_version(stored, options.version)

    def compute(body: Buffer, applier: Applier) -> Sequence[Buffer]:
        batches = decode_one(
            options.request_form,
            body,
            context.limits.max_header_bytes,
            module,
            may_take_long=applier.may_take_long,
        )
        fields: ResponseFields = {"set": name, "module": module, "version": stored.record.version}
        outputs = _stacked(call, applier, stored, batches, options, fields)
        return encode_outputs(options.response_form, outputs[module], fields, options.dtype)

    return await _answer(call, options, compute, adapter)


@router.post(
    "/v1/sets/{set}/apply",
    operation_id="apply_many",
    summary="Apply many adapters of a set in one request",
    response_class=Response,
    openapi_extra=request_body(
        tensor_schemas.ApplyManyRequest,
        Form.BINARY,
        example={"inputs": {"q_proj": [[0.5, -1.0, 2.0, 0.25]], "k_proj": [[1.0, 0.0, 0.0, 1.0]]}},
    )
    | {"parameters": parameters(APPLY_MANY_OPTIONS)},
    responses=tensor_responses(tensor_schemas.ApplyManyAnswer, Form.BINARY)
    | problems(*APPLY_ERRORS, errors.VersionNotFoundError),
)
async def apply_many(call: CallDep, name: SetName) -> BufferResponse:
    """Each module has its own inputs (in binary: a tensor with its name), or the modules named by
    `module` share one batch. All outputs come from the same version of the set. `sets` adds the
    deltas of more sets, each with a weight (in binary: as JSON in the metadata). Include the
    path's own set to give it a weight too.
    """
    context = call.context
    stored = await context.open(name, version_hint(call.query_string))
    options = read_options(call, APPLY_MANY_OPTIONS, ApplyOptions.of)
    checked_version(stored, options.version)

    def compute(body: Buffer, applier: Applier) -> Sequence[Buffer]:
        limit = context.limits.max_header_bytes
        batches = decode_many(
            options.request_form,
            body,
            limit,
            options.modules,
            may_take_long=applier.may_take_long,
        )
        fields: ResponseFields = {"set": name, "version": stored.record.version}
        outputs = _stacked(call, applier, stored, batches, options, fields)
        return encode_outputs(options.response_form, outputs, fields, options.dtype)

    return await _answer(call, options, compute, None)


@router.post(
    "/v1/apply",
    operation_id="apply_mixed",
    summary="Apply a different set to each row of a batch",
    response_class=Response,
    openapi_extra=request_body(
        tensor_schemas.ApplyMixedRequest,
        Form.BINARY,
        example={
            "module": "q_proj",
            "sets": ["my-adapter", None, [{"set": "my-adapter", "weight": 0.5}]],
            "inputs": [[0.5, -1.0, 2.0, 0.25], [1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
        },
    )
    | {"parameters": parameters(APPLY_OPTIONS)},
    responses=tensor_responses(tensor_schemas.ApplyMixedAnswer, Form.BINARY)
    | problems(*APPLY_ERRORS),
)
async def apply_mixed(call: CallDep) -> BufferResponse:
    """`sets` has one entry per row: the name of a set, null for no set (the delta is zero), or a
    list of sets with weights whose deltas are added. Ranks may differ. In binary, `module` and
    `sets` are JSON in the metadata. All rows of a set use the same version.
    """
    context = call.context
    options = read_options(call, APPLY_OPTIONS, ApplyOptions.of)
    response_form, dtype = options.response_form, options.dtype

    def compute(body: Buffer, applier: Applier) -> Sequence[Buffer]:
        module, stacks, batches = decode_mixed(
            options.request_form,
            body,
            context.limits.max_header_bytes,
            may_take_long=applier.may_take_long,
        )
        if not stacks:  # without rows, no set determines the width of the outputs
            empty = batches.inputs[module][:, :0]
            return encode_outputs(response_form, empty, {"module": module, "versions": {}}, dtype)
        read = context.store.reader(may_take_long=applier.may_take_long)
        set_segments = group_by_set(stacks, options.scale, read)
        outputs = _deltas(call, applier, set_segments, batches, options)
        fields = {"module": module, "versions": versions_of(set_segments)}
        return encode_outputs(response_form, outputs[module], fields, dtype)

    return await _answer(call, options, compute, None)


def _stacked(
    call: Call,
    applier: Applier,
    stored: StoredSet,
    batches: Batches,
    options: ApplyOptions,
    fields: ResponseFields,
) -> dict[str, Floats]:
    """Return the summed deltas of the set and those stacked on it; add `versions` to `fields`."""
    read = call.context.store.reader(may_take_long=applier.may_take_long)
    set_segments = stack_on(stored, batches.stack, options.scale, read)
    if batches.stack:
        fields["versions"] = versions_of(set_segments)
    return _deltas(call, applier, set_segments, batches, options)


def _deltas(
    call: Call,
    applier: Applier,
    set_segments: Sequence[SetSegment],
    batches: Batches,
    options: ApplyOptions,
) -> dict[str, Floats]:
    reserve = call.reserve_outputs(options.response_form)
    outputs = applier.apply(set_segments, batches, options.match, reserve=reserve)
    call.count_rows(total_rows(batches.inputs))
    return outputs


async def _answer(
    call: Call,
    options: ApplyOptions,
    compute: Callable[[Buffer, Applier], Sequence[Buffer]],
    adapter: LoraAdapter | None,
) -> BufferResponse:
    """Read the body and compute the response, inline or in a thread by estimated cost.

    `adapter` gives the estimate; without it, the work goes to a thread.
    """
    context, request_form, response_form = call.context, options.request_form, options.response_form
    limits = context.limits
    body = await call.body(
        limits.max_json_bytes if request_form is Form.JSON else limits.max_body_bytes
    )
    cost = (
        math.inf
        if adapter is None
        else cost_of_body(adapter, len(body), request_form, response_form)
    )
    parts = await context.apply(partial(compute, body), cost)
    return BufferResponse(parts, response_form)
