"""Dependencies and path parameters shared by routes."""

from typing import Annotated

from fastapi import Depends, Path

from bonsai_lora.api.call import Call, get_call
from bonsai_lora.api.context import Context, get_context

ContextDep = Annotated[Context, Depends(get_context)]
CallDep = Annotated[Call, Depends(get_call)]
SetName = Annotated[str, Path(alias="set", description="name of a set", examples=["my-adapter"])]
ModuleName = Annotated[
    str, Path(description="module name", examples=["q_proj", "model.layers.0.self_attn.q_proj"])
]
