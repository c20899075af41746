"""The objects that routes share."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event
from time import monotonic
from typing import TypeVar, cast

from fastapi import Request

from bonsai_lora.api.metrics import Metrics
from bonsai_lora.api.scopes import scope_of
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.errors import (
    SetNotFoundError,
    ShuttingDownError,
    TakesLongError,
    VersionNotFoundError,
)
from bonsai_lora.service.apply import Applier
from bonsai_lora.service.budget import Budget
from bonsai_lora.service.gain import Gains
from bonsai_lora.service.gguf_lora import CheckedFiles
from bonsai_lora.service.jobs import Jobs
from bonsai_lora.service.keys import Key, Meter, Scope, missing_scope
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.merged import MergedModels
from bonsai_lora.service.pull import Origins
from bonsai_lora.service.view import SetView
from bonsai_lora.service.work import Lane, ShortLane
from bonsai_lora.settings import Settings
from bonsai_lora.storage.counts import CountFile
from bonsai_lora.storage.regions import SharedRegions
from bonsai_lora.storage.setfile import StoredSet

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """The objects of one running application."""

    settings: Settings
    limits: Limits
    store: SetView
    memory: Budget
    spill: Budget
    short: ShortLane
    long: Lane
    opening: Lane
    """Where sets are opened if that takes long: the long lane, or more threads for a bucket."""
    applier: Applier
    regions: SharedRegions
    counts: CountFile
    bases: BaseFolder
    models: MergedModels
    checked_files: CheckedFiles
    executor: Executor
    jobs: Jobs
    gains: Gains
    origins: Origins
    metrics: Metrics
    stopping: Event = field(default_factory=Event)
    """Set once the service is about to stop, for balancers that ask whether it is ready."""
    started: float = field(default_factory=monotonic)

    def is_crowded(self) -> bool:
        """Return whether requests were refused recently because of slow clients."""
        last = max(self.short.crowded_at, self.long.crowded_at, self.memory.crowded_at)
        return monotonic() - last < self.settings.stall_seconds

    def check_ready(self) -> None:
        """Raise ShuttingDownError if the service is about to stop."""
        if self.stopping.is_set():
            raise ShuttingDownError(
                f"the service stops {self.settings.drain_seconds:g} s after SIGTERM; send requests "
                "to a different one"
            )

    def seen_by(self, key: Key, scope: Scope, meter: Meter) -> "Context":
        """Return the context of a caller: the sets that it may use for `scope`, and its rates."""
        store = self.store.seen_by(key, scope)
        # Regions belong to nobody, so that only an administrator may compute in them.
        regions = self.regions
        if regions.is_on and "admin" not in key.scopes:
            regions = SharedRegions(None, partial(missing_scope, key, "admin"))
        return replace(
            self,
            store=store,
            applier=replace(self.applier, meter=meter),
            regions=regions,
        )

    async def open(self, name: str, version: int | None = None) -> StoredSet:
        """Return the current version of a set; it is opened in a thread if that takes long.

        If it is older than `version`, or there is none, the store is asked again, as the caller
        may have seen a change that has not arrived here. Raises SetNotFoundError,
        NewerFormatError.
        """
        try:
            stored = await self._open(name)
            if version is None or stored.record.version >= version:
                return stored
        except SetNotFoundError:
            if version is None:
                raise
        await self.opening.run(self.store.refresh, name)
        return await self._open(name)

    async def open_version(self, name: str, version: int | None) -> StoredSet:
        """Return `version` of a set, or the current one; raises VersionNotFoundError too."""
        return checked_version(await self.open(name, version), version)

    async def _open(self, name: str) -> StoredSet:
        stored = self.store.read_quickly(name)
        if stored is None:
            stored = await self.opening.run(self.store.read, name)
        return stored

    async def apply(self, work: Callable[[Applier], T], nanoseconds: float) -> T:
        """Return the result of `work`, an apply, from the short lane.

        It begins again in the long lane if it turns out to take long.
        """
        try:
            return await self.short.run_estimated(partial(work, self.applier), nanoseconds)
        except TakesLongError:
            patient = replace(self.applier, may_take_long=True)
            return await self.long.run(work, patient)


def checked_version(stored: StoredSet, version: int | None) -> StoredSet:
    """Return `stored`; raises VersionNotFoundError if it is not `version`."""
    current, name = stored.record.version, stored.record.name
    if version not in (None, current):
        raise VersionNotFoundError(
            f"set {name!r} is at version {current}, not {version}; request this one, or leave the "
            "version out",
            set=name,
            got=version,
            expected=current,
        )
    return stored


async def get_context(request: Request) -> Context:
    """Return the context of the caller, as far as the route may use it; raises ForbiddenError."""
    scope = request.scope
    need = scope_of(scope["method"], scope["route"].path)
    return cast("Context", scope["caller"].context(need))
