"""What a caller sees of the store: the one place where a name becomes a set.

Routes and use cases have a `SetView` and nothing else of the store, so every name that comes in (by
path, body, metadata, query, tensor or cursor) and every name that goes out passes through it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from bonsai_lora.errors import (
    MemoryBudgetError,
    NameNotYoursError,
    QuotaExceededError,
    SetNotFoundError,
    TakesLongError,
)
from bonsai_lora.formats.names import check_set_name
from bonsai_lora.service.keys import ANYONE, Key, Scope, may, narrowed
from bonsai_lora.service.limits import Limits
from bonsai_lora.storage.dropped import Dropped
from bonsai_lora.storage.index import Sums
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.protocol import Page, Store, StoreState
from bonsai_lora.storage.setfile import SetRecord, StoredSet
from bonsai_lora.storage.staging import Staging

T = TypeVar("T")


class SetView:
    """The sets that `key` may use for `scope`, and the limits on them. Thread-safe.

    A name that is not the key's does not exist (SetNotFoundError), but to write to it is refused
    (NameNotYoursError). The methods are those of `Store`, and raise its errors too.
    """

    def __init__(
        self, store: Store, limits: Limits, key: Key = ANYONE, scope: Scope = "read"
    ) -> None:
        self._store = store
        self.limits = limits
        self.key = key
        self._scope = scope
        self.temporary: Path = store.temporary

    def seen_by(self, key: Key, scope: Scope) -> "SetView":
        """Return the same store as another caller sees it."""
        return SetView(self._store, self.limits, key, scope)

    def check_name(self, name: str) -> None:
        """Raise InvalidNameError, or an error of this class, if `name` cannot be written to."""
        check_set_name(name)
        self._check(name)

    def _check(self, name: str) -> None:
        if may(self.key, self._scope, name):
            return
        if self._scope == "write":
            starts = " or ".join(map(repr, self.key.prefixes)) or "a prefix of a different key"
            raise NameNotYoursError(
                f"the key {self.key.id!r} may not write to {name[:100]!r}; use a name that starts "
                f"with {starts}",
                key=self.key.id,
                set=name,
                expected=list(self.key.prefixes),
            )
        raise SetNotFoundError(name)

    def read(self, name: str) -> StoredSet:
        """Return the current version of a set."""
        self._check(name)
        return self._store.read(name)

    def read_quickly(self, name: str) -> StoredSet | None:
        """Return the current version of a set, or None if that would take long."""
        self._check(name)
        return self._store.read_quickly(name)

    def read_record(self, name: str) -> SetRecord:
        """Return the record of a set."""
        self._check(name)
        return self._store.read_record(name)

    def find_record(self, name: str) -> SetRecord | None:
        """Return the record of a set; None if there is no such set."""
        try:
            return self.read_record(name)
        except SetNotFoundError:
            return None

    def reader(self, *, may_take_long: bool) -> Callable[[str], StoredSet]:
        """Return `read`, or what raises TakesLongError in its place for a set that takes long."""

        def read(name: str) -> StoredSet:
            stored = self.read_quickly(name)
            if stored is None:
                raise TakesLongError
            return stored

        return self.read if may_take_long else read

    def refresh(self, name: str) -> None:
        """Make the next look-up of `name` see all changes that were made before this call."""
        self._check(name)
        self._store.refresh(name)

    def records(self) -> list[SetRecord]:
        """Return the records of the caller's sets, sorted by name."""
        return self.page("", after="", base_model_name=None, limit=-1).records

    def page(self, prefix: str, *, after: str, base_model_name: str | None, limit: int) -> Page:
        """Return up to `limit` records (-1: all) of names that begin with `prefix`, by name."""
        starts = narrowed(self.key.starts, prefix)
        return self._store.page(starts, after=after, base=base_model_name, limit=limit)

    def sums(self) -> Sums:
        """Return the sums over the caller's sets."""
        return self._store.sums(*self.key.starts)

    def largest(self, limit: int) -> Page:
        """Return the records of the caller's largest sets, the largest first."""
        return self._store.largest(self.key.starts, limit)

    def open_sets(self) -> list[StoredSet]:
        """Return the caller's sets that this process has open."""
        return [one for one in self._store.open_sets() if self.key.owns(one.record.name)]

    def newer_files(self) -> dict[str, int]:
        """Return the sizes in bytes, by set name, of the caller's files of a newer release."""
        return self._own(self._store.newer_files())

    def bad_files(self, most: int | None = None) -> dict[str, str]:
        """Return the reasons, by set name, of the caller's unreadable files among `most`."""
        return self._own(self._store.bad_files(most))

    def _own(self, found: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in found.items() if self.key.owns(name)}

    def all_sums(self) -> Sums:
        """Return the sums over all sets, whoever asks."""
        return self._store.sums("")

    def count_bad_files(self) -> int:
        """Return the number of unreadable files, whoever asks."""
        return self._store.count_bad_files()

    def dropped(self) -> Dropped:
        """Return what others put into the folder of the store, whoever asks."""
        return self._store.dropped()

    def is_writable(self) -> bool:
        """Return whether the store can be changed, whoever asks."""
        return self._store.is_writable()

    def state(self) -> StoreState:
        """Return how the store is doing, whoever asks."""
        return self._store.state()

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock to change `name`."""
        self._check(name)
        return self._store.lock(name)

    def check_budget(self, name: str, new_bytes: int) -> None:
        """Raise MemoryBudgetError if all sets, with `name` at `new_bytes`, exceed the budget.

        Raises QuotaExceededError if those that the caller sees exceed its quota.
        """
        self.check_quota(name, new_bytes)
        held, budget = self.held_bytes(besides=name), self.limits.memory_budget_bytes
        if held + new_bytes > budget:
            known = {"held_bytes": held} if self.key.sees_all else {}
            raise MemoryBudgetError(
                f"set {name!r} needs {new_bytes} bytes and the other sets hold "
                f"{known.get('held_bytes', 'the rest')}, but the budget is {budget}; delete sets, "
                "or raise memory_budget_bytes",
                needed_bytes=new_bytes,
                **known,
                budget_bytes=budget,
            )

    def held_bytes(self, besides: str) -> int:
        """Return the size as float32 of all sets but one, whoever asks: they share the budget.

        Sets that a newer release wrote count as much as their files.
        """
        total, one = self.all_sums(), self._store.sums_of(besides)
        return total.held_bytes + total.newer_bytes - one.held_bytes - one.newer_bytes

    def check_quota(self, name: str, new_bytes: int) -> None:
        """Raise QuotaExceededError if the caller's sets, with `name` at `new_bytes`, exceed it."""
        quota = self.key.quota
        if quota.sets is None and quota.bytes is None:
            return
        total = self.sums()
        present = self._store.sums_of(name)
        others, held = total.sets - present.sets, total.held_bytes - present.held_bytes
        count = others + 1
        if quota.sets is not None and count > quota.sets:
            raise QuotaExceededError(
                f"the key's prefixes have {others} sets, and its quota is "
                f"{quota.sets}; delete sets, or use another key",
                got=count,
                limit=quota.sets,
            )
        if quota.bytes is not None and held + new_bytes > quota.bytes:
            raise QuotaExceededError(
                f"set {name!r} needs {new_bytes} bytes and the other sets under the key's prefixes "
                f"hold {held}, but its quota is {quota.bytes}; delete sets, or use another key",
                needed_bytes=new_bytes,
                held_bytes=held,
                limit_bytes=quota.bytes,
            )

    def write(self, wanted: NextVersion) -> StoredSet:
        """Write the next version of a set durably, and return it opened.

        Raises the errors of `check_budget`.
        """
        self._check(wanted.name)
        size = wanted.lora_set.total_memory_bytes()
        return self._store.write(wanted, partial(self.check_budget, wanted.name, size))

    def new_file(self) -> AbstractContextManager[BinaryIO]:
        """Create a temporary file on the store's file system; it is removed on exit."""
        return self._store.new_file()

    def staging(self, name: str) -> Staging:
        """Return where uploads for `name` wait for the commit that names them."""
        self._check(name)
        return self._store.staging

    def link_secret(self) -> bytes:
        """Return what signs links to upload to, whoever asks."""
        return self._store.staging.secret()

    def delete(self, name: str) -> None:
        """Delete a set durably."""
        self._check(name)
        self._store.delete(name)

    def keep(self, name: str) -> None:
        """Keep a set on this machine, for all workers, until `release`."""
        self._check(name)
        self._store.keep(name)

    def release(self, name: str) -> None:
        """End `keep`, and release this process's state of a set; it is read again on next use."""
        self._check(name)
        self._store.release(name)
