"""The objects that routes share."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import TypeVar, cast

from fastapi import Request

from bonsai_lora.api.metrics import Metrics
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.errors import TakesLongError
from bonsai_lora.service.apply import Applier
from bonsai_lora.service.budget import Budget
from bonsai_lora.service.infer import Inference
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.merged import MergedModels
from bonsai_lora.service.work import Lane, ShortLane
from bonsai_lora.settings import Settings
from bonsai_lora.storage.counts import CountFile
from bonsai_lora.storage.store import SetStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """The objects of one running application."""

    settings: Settings
    store: SetStore
    limits: Limits
    memory: Budget
    spill: Budget
    short: ShortLane
    long: Lane
    applier: Applier
    inference: Inference
    counts: CountFile
    bases: BaseFolder
    models: MergedModels
    executor: Executor
    metrics: Metrics
    started: float = field(default_factory=monotonic)

    async def apply(self, work: Callable[[Applier], T], nanoseconds: float) -> T:
        """Return the result of `work`, an apply, from the short lane.

        It begins again in the long lane if it turns out to take long.
        """
        try:
            return await self.short.run(partial(work, self.applier), nanoseconds)
        except TakesLongError:
            patient = replace(self.applier, may_take_long=True)
            return await self.long.run(partial(work, patient))


async def get_context(request: Request) -> Context:
    """Return the context that `create_app` made."""
    return cast("Context", request.app.state.context)
