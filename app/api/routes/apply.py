"""Apply adapters to batches of vectors (contract, sections 3 and 4)."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api import schemas
from app.api.body import read_body
from app.api.deps import Context, InContext, ModuleName, SetName
from app.api.openapi import APPLY_ERRORS, problems, tensor_answer, tensor_body
from app.service.apply import apply_adapter, apply_adapters
from app.service.sets import get_adapter
from app.wire.media import Form, answer_form, check_answer_dtype, request_form
from app.wire.tensors import decode_inputs, decode_inputs_by_module, encode_outputs

router = APIRouter(tags=["apply"])

_FORMS = (Form.JSON, Form.BINARY)

AnswerDtype = Annotated[
    str | None, Query(alias="dtype", description="F32 (default), F16 or BF16; binary answers only")
]


@router.post(
    "/v1/sets/{set}/adapters/{module}/apply",
    operation_id="apply_adapter",
    summary="Apply one adapter to a batch of vectors",
    response_class=Response,
    openapi_extra=tensor_body(
        schemas.ApplyRequest, Form.BINARY, example={"inputs": [[0.5, -1.0, 2.0, 0.25]]}
    ),
    responses=tensor_answer(schemas.ApplyAnswer, Form.BINARY) | problems(*APPLY_ERRORS),
)
async def apply_one(
    request: Request,
    context: InContext,
    name: SetName,
    module: ModuleName,
    dtype: AnswerDtype = None,
) -> Response:
    """Answers scaling · B·A·x for each row x; add it to the base layer's output. The binary form
    is a safetensors body with the tensor `inputs`, answered by the tensor `outputs`.
    """
    stored = context.store.read(name)
    adapter = get_adapter(stored, module)
    limits = context.limits

    def compute(body: bytes, taken: Form, given: Form, answer_dtype: str) -> bytes:
        inputs = decode_inputs(taken, body, limits.max_header_bytes)
        outputs = apply_adapter(stored, module, inputs, limits)
        context.metrics.rows_applied.inc(1 if inputs.ndim == 1 else len(inputs))
        about = {"set": name, "module": module, "version": stored.record.version}
        return encode_outputs(given, outputs, about, answer_dtype)

    width = adapter.rank * (adapter.d_in + adapter.d_out) // max(1, adapter.d_in)
    return await _answer(request, context, dtype, compute, cost_per_value=width)


@router.post(
    "/v1/sets/{set}/apply",
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
async def apply_many(
    request: Request,
    context: InContext,
    name: SetName,
    module: Annotated[
        list[str] | None, Query(description="modules that all get the one batch `inputs`")
    ] = None,
    dtype: AnswerDtype = None,
) -> Response:
    """Each module gets its own inputs (binary: a tensor of its name), or all named by `module`
    get the same. All outputs come from one version of the set.
    """
    stored = context.store.read(name)
    limits = context.limits

    def compute(body: bytes, taken: Form, given: Form, answer_dtype: str) -> bytes:
        inputs = decode_inputs_by_module(taken, body, limits.max_header_bytes, module or [])
        outputs = apply_adapters(stored, inputs, limits)
        rows = sum(1 if one.ndim == 1 else len(one) for one in inputs.values())
        context.metrics.rows_applied.inc(rows)
        about = {"set": name, "version": stored.record.version}
        return encode_outputs(given, outputs, about, answer_dtype)

    # A body may name the whole model: let anything but a few kilobytes go to a thread.
    return await _answer(request, context, dtype, compute, cost_per_value=1000)


async def _answer(
    request: Request,
    context: Context,
    dtype: str | None,
    compute: Callable[[bytes, Form, Form, str], bytes],
    *,
    cost_per_value: int,
) -> Response:
    """Read the body, compute in the right place, and answer in the form that the caller wants."""
    taken = request_form(request.headers.get("content-type"), _FORMS)
    given = answer_form(request.headers.get("accept"), taken, _FORMS)
    answer_dtype = check_answer_dtype(dtype, given)
    with context.pool.admit():
        body = await read_body(request, context.limits.max_body_bytes)
        # A number takes at least 2 bytes ("0,"); reading it costs about as much as 16 products.
        cost = len(body) // 2 * (cost_per_value + 16)
        content = await context.pool.run(
            lambda: compute(body, taken, given, answer_dtype), cost=cost
        )
    return Response(content, media_type=given.value)
