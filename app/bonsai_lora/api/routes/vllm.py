"""Routes that users of vLLM, SGLang and OpenAI's API know, over sources and sets.

The requests and answers are those of vLLM 0.11 (`/v1/…`) and SGLang 0.5 (without the prefix), where
`lora_path` is a reference to one of this service's sources, and never a path or an address.
"""

from datetime import datetime
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from bonsai_lora import errors
from bonsai_lora.api.body import read_model
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.service import sets
from bonsai_lora.service.keys import check_scope
from bonsai_lora.service.pull import pull_set
from bonsai_lora.service.work import Place
from bonsai_lora.storage.setfile import SetRecord

router = APIRouter(include_in_schema=False)


# Fields that mean nothing here, such as SGLang's `pinned`, are ignored.


class _Load(BaseModel):
    lora_name: str
    lora_path: str = Field(max_length=1024)
    load_inplace: bool = False


class _Unload(BaseModel):
    lora_name: str


@router.post("/v1/load_lora_adapter")
async def load_of_vllm(request: Request, context: ContextDep) -> Response:
    """Pull a set; the answer is vLLM's."""
    wanted = await _load(request, context)
    text = f"Success: LoRA adapter '{wanted.lora_name}' added successfully."
    return PlainTextResponse(text)


@router.post("/load_lora_adapter")
async def load_of_sglang(request: Request, context: ContextDep) -> dict[str, Any]:
    """Pull a set; the answer is SGLang's."""
    wanted = await _load(request, context)
    return {"success": True, "loaded_adapters": {wanted.lora_name: wanted.lora_path}}


@router.post("/v1/unload_lora_adapter")
async def unload_of_vllm(request: Request, context: ContextDep) -> Response:
    """Delete a set that was pulled; the answer is vLLM's."""
    name = await _unload(request, context)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


@router.post("/unload_lora_adapter")
async def unload_of_sglang(request: Request, context: ContextDep) -> dict[str, Any]:
    """Delete a set that was pulled; the answer is SGLang's."""
    await _unload(request, context)
    return {"success": True, "loaded_adapters": {}}


@router.get("/v1/models")
async def list_models(
    context: ContextDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    after: Annotated[str, Query(max_length=96)] = "",
) -> dict[str, Any]:
    """Return the sets in the form of OpenAI's list of models, a page at a time."""
    page = partial(
        sets.list_sets, context.store, limit=limit, cursor=after, base_model_name=None, prefix=""
    )
    found, following = await anyio.to_thread.run_sync(page)
    return {
        "object": "list",
        "data": [_model(one) for one in found.records],
        "has_more": following is not None,
    }


def _model(record: SetRecord) -> dict[str, Any]:
    return {
        "id": record.name,
        "object": "model",
        "created": int(datetime.fromisoformat(record.created_at).timestamp()),
        "owned_by": "bonsai-lora",
        "root": record.name,
        "parent": record.base_model_name or None,
    }


async def _load(request: Request, context: Context) -> _Load:
    """Pull the set that the body names, as `pull_set` does."""
    check_scope(context.store.key, "pull")
    with Place(context.long) as place:
        wanted = await read_model(request, _Load, place)

        def check(present: SetRecord | None) -> None:
            if present is not None and not wanted.load_inplace:
                raise errors.AlreadyLoadedError(
                    f"a set named {wanted.lora_name!r} exists; send "
                    "load_inplace: true to replace it",
                    set=wanted.lora_name,
                )

        await context.long.run(
            pull_set, context.store, context.origins, wanted.lora_name, wanted.lora_path, check
        )
    return wanted


async def _unload(request: Request, context: Context) -> str:
    """Delete the set that the body names, if it was pulled; return the name."""
    with Place(context.long) as place:
        name = (await read_model(request, _Unload, place)).lora_name

        def check(present: SetRecord | None) -> None:
            if present is not None and not _is_pulled(present):
                raise errors.NotFromSourceError(
                    f"the set {name!r} was not pulled from a source; use DELETE /v1/sets/{name}",
                    set=name,
                )

        await context.long.run(sets.delete_set, context.store, name, check)
    return name


def _is_pulled(record: SetRecord) -> bool:
    return record.source is not None and not record.source.reference.startswith("folder:")
