"""Dependencies and path parameters shared by routes."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Path, Query

from bonsai_lora.api.call import Call, get_call
from bonsai_lora.api.context import Context, get_context
from bonsai_lora.api.query import DECIMAL
from bonsai_lora.service.budget import Reservation
from bonsai_lora.storage.setfile import StoredSet

VERSION_DESCRIPTION = "the version that is wanted: this one, or 404 `version_not_found`"

ContextDep = Annotated[Context, Depends(get_context)]
CallDep = Annotated[Call, Depends(get_call)]


async def _get_memory(context: ContextDep) -> AsyncIterator[Reservation]:
    with Reservation(context.memory) as reserved:
        yield reserved


SentMemory = Annotated[Reservation, Depends(_get_memory)]
"""Memory that is released when the response has been sent."""
SetName = Annotated[str, Path(alias="set", description="name of a set", examples=["my-adapter"])]
ModuleName = Annotated[
    str, Path(description="module name", examples=["q_proj", "model.layers.0.self_attn.q_proj"])
]
WantedVersion = Annotated[
    int | None, Query(alias="version", ge=1, lt=1 << 53, description=VERSION_DESCRIPTION), DECIMAL
]


async def _get_stored(
    context: ContextDep, name: SetName, version: WantedVersion = None
) -> StoredSet:
    return await context.open_version(name, version)


WantedSet = Annotated[StoredSet, Depends(_get_stored)]
"""The set that the path names, in the version that the query asks for."""
