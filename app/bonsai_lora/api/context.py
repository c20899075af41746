"""The objects that routes share."""

from concurrent.futures import Executor
from dataclasses import dataclass, field
from time import monotonic
from typing import cast

from fastapi import Request

from bonsai_lora.api.metrics import Metrics
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.service.apply import Applier
from bonsai_lora.service.infer import Inference
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.merged import MergedModels
from bonsai_lora.service.work import WorkPool
from bonsai_lora.settings import Settings
from bonsai_lora.storage.counts import CountFile
from bonsai_lora.storage.store import SetStore


@dataclass(frozen=True, slots=True)
class Context:
    """The objects of one running application."""

    settings: Settings
    store: SetStore
    limits: Limits
    pool: WorkPool
    applier: Applier
    inference: Inference
    counts: CountFile
    bases: BaseFolder
    models: MergedModels
    executor: Executor
    metrics: Metrics
    started: float = field(default_factory=monotonic)


async def get_context(request: Request) -> Context:
    """Return the context that `create_app` made."""
    return cast("Context", request.app.state.context)
