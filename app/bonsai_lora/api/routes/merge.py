"""Merge one adapter into streamed weights."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import Response as StarletteResponse
from starlette.types import Receive, Scope, Send

from bonsai_lora import errors
from bonsai_lora.api import tensor_schemas
from bonsai_lora.api.body import BodyReader, body_form, content_length, read_body
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep, ModuleName, SetName, WantedVersion
from bonsai_lora.api.merge_stream import MergeStream
from bonsai_lora.api.openapi import (
    TENSOR_ERRORS,
    VERSION_ERRORS,
    problems,
    request_body,
    tensor_responses,
)
from bonsai_lora.api.spool import Spool
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.formats import safetensors
from bonsai_lora.service.apply import check_no_replaced_bias
from bonsai_lora.service.merge import MergeDtype, WeightMerge, merge_of_header, stored_adapter
from bonsai_lora.service.work import Place
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire import json
from bonsai_lora.wire.media import Form, negotiate_form
from bonsai_lora.wire.tensors import check_json_output

router = APIRouter(tags=["merge"])

_FORMS = (Form.JSON, Form.BINARY, Form.RAW)
_SMALL_HEADER_BYTES = 1 << 13


@router.post(
    "/v1/sets/{set}/adapters/{module}/merge",
    summary="Merge an adapter into weights",
    response_class=Response,
    openapi_extra=request_body(tensor_schemas.MergeRequest, Form.BINARY, Form.RAW),
    responses=tensor_responses(tensor_schemas.MergeAnswer, Form.BINARY, Form.RAW)
    | problems(
        *TENSOR_ERRORS,
        *VERSION_ERRORS,
        errors.AdapterNotFoundError,
        errors.NonFiniteOutputError,
        errors.UnsupportedAdapterError,
    ),
)
async def merge_weights(
    request: Request,
    context: ContextDep,
    name: SetName,
    module: ModuleName,
    dtype: Annotated[
        MergeDtype | None,
        Query(description="required for application/octet-stream"),
    ] = None,
    unmerge: Annotated[bool, Query(description="subtract the delta instead of adding it")] = False,
    version: WantedVersion = None,
) -> StarletteResponse:
    """Takes W (d_out, d_in) and returns W + scaling · B·A in the same form and dtype, streamed in
    constant memory. The sum is computed in float32 and rounded once, to nearest even.
    """
    stored = await context.open_version(name, version)
    adapter = stored_adapter(stored, module)
    check_no_replaced_bias(stored, module)
    form = body_form(request, _FORMS)
    negotiate_form(request.headers.get("accept"), form, (form,))
    if form is Form.JSON:
        return await _merge_json(
            request, context, stored, module, WeightMerge(adapter, "F32", unmerge)
        )
    return _StreamedMerge(request, context, adapter, form, dtype, unmerge)


async def _merge_json(
    request: Request, context: Context, stored: StoredSet, module: str, merge: WeightMerge
) -> Response:
    with Place(context.long) as place:
        body = await read_body(request, context.limits.max_json_bytes, place)

        def compute() -> bytes:
            value = json.decode_object(body, frozenset({"weights"}))
            weights = json.decode_tensor(value.get("weights"), "weights")
            merged = merge.merge_array(weights)
            check_json_output("weights", merged)
            record = stored.record
            about = {"set": record.name, "module": module, "version": record.version}
            return b"".join(json.encode({**about, "weights": merged}))

        content = await context.long.run(compute)
    context.metrics.bytes_merged.inc(merge.total_bytes)
    return Response(content, media_type=Form.JSON)


@dataclass(eq=False)
class _StreamedMerge(StarletteResponse):
    """Validates the header of the weights, then streams."""

    request: Request
    context: Context
    adapter: LoraAdapter
    form: Form
    dtype: str | None
    unmerge: bool
    background: None = None
    """FastAPI reads this attribute."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        settings = self.context.settings
        with self.context.long.admit():
            reader = BodyReader(self.request)
            merge, prefix = await self._begin(reader)
            self._check_declared(merge, len(prefix) + merge.total_bytes)
            stream = MergeStream(
                merge,
                reader,
                prefix,
                self.form,
                lane=self.context.long,
                spool=Spool(
                    self.context.spill, settings.stall_seconds, self.context.store.temporary
                ),
                on_bytes=self.context.metrics.bytes_merged.inc,
            )
            await stream.run(send)

    async def _begin(self, reader: BodyReader) -> tuple[WeightMerge, bytes]:
        """Return the merge, and the prefix of the body that is returned unchanged."""
        if self.form is Form.RAW:
            if self.dtype is None:
                raise errors.InvalidRequestError(
                    "the dtype of the raw weights is missing; add ?dtype=F32, F16 or BF16",
                    field="dtype",
                )
            return WeightMerge(self.adapter, self.dtype, self.unmerge), b""
        limit = self.context.limits.max_header_bytes
        prefix = bytes(await reader.read_exactly(8))
        prefix += await reader.read_exactly(safetensors.header_length(prefix, limit))
        decode = partial(safetensors.decode_header, prefix, most=safetensors.FEW_TENSORS)
        is_short = len(prefix) < _SMALL_HEADER_BYTES
        header = decode() if is_short else await self.context.long.run(decode)
        merge = merge_of_header(self.adapter, header, unmerge=self.unmerge)
        if self.dtype not in (None, merge.dtype):
            raise errors.InvalidRequestError(
                f"dtype is {self.dtype!r}, but the tensor 'weights' is {merge.dtype}; omit the "
                "parameter",
                field="dtype",
            )
        return merge, prefix

    def _check_declared(self, merge: WeightMerge, expected: int) -> None:
        declared = content_length(self.request)
        if declared is not None and declared != expected:
            raise errors.ShapeMismatchError(
                f"the body has {errors.counted(declared, 'byte')}, but weights of shape "
                f"{list(merge.shape)} have {expected}; check their shape and dtype",
                got_bytes=declared,
                expected_bytes=expected,
            )
