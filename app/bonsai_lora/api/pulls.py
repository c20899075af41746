"""Pulls by reference, which several routes offer."""

from functools import partial

from bonsai_lora.api.context import Context
from bonsai_lora.formats.experts import ExpertLayout
from bonsai_lora.service.pull import pull_set
from bonsai_lora.service.sets import Imported, Precondition


async def pull(
    context: Context,
    name: str,
    reference: str,
    check: Precondition,
    base_model_name: str | None = None,
    expert_layout: ExpertLayout | None = None,
) -> Imported:
    """Create or replace a set in the long lane; raises the errors of `pull_set`."""
    work = partial(
        pull_set,
        context.store,
        context.spill,
        context.origins,
        name,
        reference,
        check,
        base_model_name=base_model_name,
        expert_layout=expert_layout,
    )
    return await context.long.run(work)
