"""Apply adapters to batches of vectors.

The operations are declared here to the framework, for its document, and answered by the functions
below them, which `app/bonsai_lora/api/hot.py` calls.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from bonsai_lora.api import schemas
from bonsai_lora.api.call import Call, Key, Options
from bonsai_lora.api.deps import Context, ModuleName, SetName
from bonsai_lora.api.hot import HotRoute
from bonsai_lora.api.openapi import (
    APPLY_ERRORS,
    answered_before,
    problems,
    tensor_answer,
    tensor_body,
)
from bonsai_lora.api.request_head import RequestHead
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats
from bonsai_lora.formats import safetensors
from bonsai_lora.service.apply import (
    cost_of_body,
    shares_of,
    stacked_shares,
    total_rows,
    versions_of,
)
from bonsai_lora.service.plans import PLANNED_JSON_BYTES, binary_sources, json_sources, make_plan
from bonsai_lora.service.sets import get_adapter
from bonsai_lora.storage.counts import Counts
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire import json
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.stacks import MAX_SCALE
from bonsai_lora.wire.tensors import (
    INPUTS,
    Batches,
    decode_many,
    decode_mixed,
    decode_one,
    encode_outputs,
)

router = APIRouter(tags=["apply"])

ONE = "/v1/sets/{set}/adapters/{module}/apply"
MANY = "/v1/sets/{set}/apply"
MIXED = "/v1/apply"

About = dict[str, Any]
"""What an answer says besides its tensors."""

AnswerDtype = Annotated[
    str | None, Query(alias="dtype", description="F32 (default), F16 or BF16; binary answers only")
]
Scale = Annotated[
    float, Query(ge=-MAX_SCALE, le=MAX_SCALE, description="factor on everything that is added")
]

Match = Annotated[
    str | None,
    Query(description="start of the names of the base's tensors, for DoRA modules in several"),
]


@router.post(
    ONE,
    operation_id="apply_adapter",
    summary="Apply one adapter to a batch of vectors",
    response_class=Response,
    openapi_extra=tensor_body(
        schemas.ApplyRequest, Form.BINARY, example={"inputs": [[0.5, -1.0, 2.0, 0.25]]}
    ),
    responses=tensor_answer(schemas.ApplyAnswer, Form.BINARY) | problems(*APPLY_ERRORS),
)
@answered_before
async def apply_one(
    name: SetName,
    module: ModuleName,
    dtype: AnswerDtype = None,
    scale: Scale = 1.0,
    match: Match = None,
) -> None:
    """Answers scaling · B·A·x for each row x; add it to the base layer's output. The binary form
    is a safetensors body with the tensor `inputs`, answered by the tensor `outputs`. `sets` stacks
    further sets on top, each with its weight (binary: as JSON in the metadata); naming the path's
    own set there gives it a weight too. Where the module is fused experts of an MoE layer,
    `experts` (binary: an I32 or I64 tensor) has the number of the expert of each row.
    """


async def answer_one(context: Context, call: Call, name: str, module: str) -> None:
    """Answer `apply_one`."""
    stored = context.store.read(name)
    adapter = get_adapter(stored, module)
    options = call.options("dtype", "scale", "match")

    def compute(body: Buffer) -> Sequence[Buffer]:
        batches = decode_one(options.taken, body, context.limits.max_header_bytes, module)
        about: About = {"set": name, "module": module, "version": stored.record.version}
        outputs = _stacked(context, stored, batches, options, about)
        parts = encode_outputs(options.given, outputs[module], about, options.dtype)
        _plan(call, stored, options, {module: INPUTS}, batches, body, parts)
        return parts

    await _answer(context, call, options, compute, adapter)


@router.post(
    MANY,
    operation_id="apply_many",
    summary="Apply many adapters of a set in one request",
    response_class=Response,
    openapi_extra=tensor_body(
        schemas.ApplyManyRequest,
        Form.BINARY,
        example={"inputs": {"q_proj": [[0.5, -1.0, 2.0, 0.25]], "k_proj": [[1.0, 0.0, 0.0, 1.0]]}},
    ),
    responses=tensor_answer(schemas.ApplyManyAnswer, Form.BINARY) | problems(*APPLY_ERRORS),
)
@answered_before
async def apply_many(
    name: SetName,
    module: Annotated[
        list[str] | None, Query(description="modules that all get the one batch `inputs`")
    ] = None,
    dtype: AnswerDtype = None,
    scale: Scale = 1.0,
    match: Match = None,
) -> None:
    """Each module gets its own inputs (binary: a tensor of its name), or all named by `module`
    get the same. All outputs come from one version of the set. `sets` stacks further sets on top,
    each with its weight (binary: as JSON in the metadata); naming the path's own set there gives
    it a weight too.
    """


async def answer_many(context: Context, call: Call, name: str) -> None:
    """Answer `apply_many`."""
    stored = context.store.read(name)
    options = call.options("dtype", "scale", "module", "match")

    def compute(body: Buffer) -> Sequence[Buffer]:
        limit = context.limits.max_header_bytes
        batches = decode_many(options.taken, body, limit, options.modules)
        about: About = {"set": name, "version": stored.record.version}
        outputs = _stacked(context, stored, batches, options, about)
        parts = encode_outputs(options.given, outputs, about, options.dtype)
        tensors = {one: INPUTS if options.modules else one for one in outputs}
        _plan(call, stored, options, tensors, batches, body, parts)
        return parts

    await _answer(context, call, options, compute, None)


@router.post(
    MIXED,
    operation_id="apply_mixed",
    summary="Apply a different set to each row of a batch",
    response_class=Response,
    openapi_extra=tensor_body(
        schemas.ApplyMixedRequest,
        Form.BINARY,
        example={
            "module": "q_proj",
            "sets": ["my-adapter", None, [{"set": "my-adapter", "weight": 0.5}]],
            "inputs": [[0.5, -1.0, 2.0, 0.25], [1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
        },
    ),
    responses=tensor_answer(schemas.ApplyMixedAnswer, Form.BINARY) | problems(*APPLY_ERRORS),
)
@answered_before
async def apply_mixed(dtype: AnswerDtype = None, scale: Scale = 1.0, match: Match = None) -> None:
    """`sets` says for each row which set it goes through: a name, null for none (its delta is
    zero), or a list of sets with weights whose deltas are added. Ranks may differ. In binary,
    `module` and `sets` are JSON in the metadata. Each set takes part with one version.
    """


async def answer_mixed(context: Context, call: Call) -> None:
    """Answer `apply_mixed`."""
    options = call.options("dtype", "scale", "match")
    given, dtype = options.given, options.dtype

    def compute(body: Buffer) -> Sequence[Buffer]:
        batch = decode_mixed(options.taken, body, context.limits.max_header_bytes)
        module, inputs = batch.module, {batch.module: batch.inputs}
        base_outputs = {} if batch.base_outputs is None else {module: batch.base_outputs}
        if not batch.stacks:  # nothing in, nothing out; nobody says how wide that is
            return encode_outputs(
                given, inputs[module][:, :0], {"module": module, "versions": {}}, dtype
            )
        shares = shares_of(batch.stacks, options.scale, context.store.read)
        outputs = context.applier.apply(shares, inputs, base_outputs, batch.experts, options.match)
        context.metrics.rows_applied.inc(total_rows(inputs))
        about = {"module": module, "versions": versions_of(shares)}
        return encode_outputs(given, outputs[module], about, dtype)

    await _answer(context, call, options, compute, None)


def _stacked(
    context: Context, stored: StoredSet, batches: Batches, options: Options, about: About
) -> dict[str, Floats]:
    """Return what the set and those stacked on it add; `about` learns of their versions."""
    shares = stacked_shares(stored, batches.stack, options.scale, context.store.read)
    outputs = context.applier.apply(
        shares, batches.inputs, batches.base_outputs, batches.experts, options.match
    )
    context.metrics.rows_applied.inc(total_rows(batches.inputs))
    if batches.stack:
        about["versions"] = versions_of(shares)
    return outputs


def _plan(
    call: Call,
    stored: StoredSet,
    options: Options,
    tensors: Mapping[str, str],
    batches: Batches,
    body: Buffer,
    parts: Sequence[Buffer],
) -> None:
    """Let the next request of this form be answered by a plan, where one can be made."""
    taken, given = options.taken, options.given
    if not call.can_plan or taken != given or batches.stack or batches.base_outputs:
        return
    key: Key | None
    if taken is Form.BINARY:
        key = safetensors.short_header(body)
        found = binary_sources(key, tensors) if key and options.dtype == "F32" else None
    elif len(body) <= PLANNED_JSON_BYTES:
        lists = json.take_lists(body)
        key, found = lists.form, json_sources(lists, tensors)
    else:
        return
    if key is not None and found is not None:
        size, rows = len(body), total_rows(batches.inputs)
        plan = make_plan(
            stored, *found, options.scale, body_bytes=size, parts=parts, rows=rows, form=taken
        )
        call.remember_plan(stored, key, plan)


async def _answer(
    context: Context,
    call: Call,
    options: Options,
    compute: Callable[[Buffer], Sequence[Buffer]],
    adapter: LoraAdapter | None,
) -> None:
    """Read the body, compute in the right place, and answer."""
    limits, taken, given = context.limits, options.taken, options.given
    with context.pool.admit():
        limit = limits.max_json_bytes if taken is Form.JSON else limits.max_body_bytes
        body = await call.body(limit, context.settings.stall_seconds)
        recalled = call.find_plan(body)
        if recalled is None:
            cost = math.inf if adapter is None else cost_of_body(adapter, len(body), taken, given)
            parts = await context.pool.run(partial(compute, body), cost)
        else:
            counts = Counts()
            plan, lists = recalled
            run = partial(plan.run, body, lists, context.inference.regions, counts)
            parts = await context.pool.run(run, plan.cost)
            context.metrics.rows_applied.inc(counts.vectors)
    await call.answer(parts, given.value)


def _form(_head: RequestHead, body: Buffer) -> bytes | None:
    return safetensors.short_header(body)


HOT_ROUTES = [
    HotRoute(ONE, answer_one, _form),
    HotRoute(MANY, answer_many, _form),
    HotRoute(MIXED, answer_mixed),
]
