"""Extract a set from a fine-tuned model and its base: check, compute by tensor, report, store."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from bonsai_lora.checkpoints import extraction
from bonsai_lora.checkpoints.base import Base
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.extraction import Change, Pair, Size
from bonsai_lora.core.combine import Loss
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import InvalidRequestError, UnsupportedAdapterError, counted
from bonsai_lora.formats.gguf_names import HEAD
from bonsai_lora.formats.made_config import extracted_config
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.jobs import Progress
from bonsai_lora.service.keys import check_scope
from bonsai_lora.service.sets import refuse_existing, store_new
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.setfile import StoredSet

_MOST_RANK = 128
"""Highest rank with an energy, unless one is given."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an extraction found, and what it lost."""

    changes: Sequence[Change]
    same: int
    """Tensors that are the same in both checkpoints."""

    @property
    def rank(self) -> int:
        """The highest rank of a module."""
        return max((one.adapter.rank for one in self.changes if one.adapter), default=0)

    @property
    def loss(self) -> Loss:
        """That of all differences together."""
        return sum((one.loss for one in self.changes), Loss())

    @property
    def warnings(self) -> list[str]:
        """What a person should know."""
        left = [one.pair.name for one in self.changes if one.kind == "left_out"]
        text = (
            f"{len(left)} of the changed tensors cannot be part of an adapter and are left out: "
            f"{', '.join(left[:8])}"
        )
        return [text] if left else []


@dataclass(frozen=True, slots=True)
class Plan:
    """An extraction that has been checked; each tensor is computed on its own."""

    name: str
    base: Base
    tuned: Base
    pairs: Sequence[Pair]
    size: Size

    def works(self, progress: Progress, reserved: Reservation) -> list[Callable[[], Change | None]]:
        """Return the computation of each tensor; what the results take is added to `reserved`."""
        lock = threading.Lock()

        def reserve(size: int) -> None:
            with lock:
                reserved.add(size)

        works = [
            partial(extraction.extract, self.base, one, self.size, progress.check, reserve)
            for one in self.pairs
        ]
        return progress.follow(works, [one.values for one in self.pairs])

    def work_bytes(self) -> int:
        """Return the most that the computation of one tensor takes."""
        return max((extraction.work_bytes(one, self.size) for one in self.pairs), default=0)

    def report(self, found: Sequence[Change | None]) -> Report:
        """Return the report of the computed tensors.

        Raises InvalidRequestError if nothing differs, UnsupportedAdapterError if the differences
        are no adapter.
        """
        changes = [one for one in found if one is not None]
        if not changes:
            raise InvalidRequestError(
                f"{self.base.name!r} and {self.tuned.name!r} have the same "
                f"{counted(len(found), 'tensor')}; name two that differ",
                field="tuned",
            )
        if not any(one.adapter is not None or one.rows is not None for one in changes):
            raise UnsupportedAdapterError(
                f"only {', '.join(one.pair.name for one in changes[:8])} differ, and an adapter "
                "needs a matrix that does; use the tuned model itself"
            )
        if self.base.is_tied and any(one.pair.name == HEAD for one in changes):
            raise UnsupportedAdapterError(
                f"base {self.base.name!r} ties its head to its embedding, but {self.tuned.name!r} "
                "has a different head; untie the base first (save it with tie_word_embeddings "
                "false and a separate head)",
                base=self.base.name,
            )
        return Report(changes, len(found) - len(changes))

    def store(self, store: SetView, report: Report) -> StoredSet:
        """Store the new set; raises SetExistsError, MemoryBudgetError and the store's errors."""
        adapters = extraction.adapters_of(report.changes)
        store.limits.check_modules(len(adapters))
        replaced = extraction.replacements_of(report.changes)
        rows = {
            one.pair.module: one.rows.tolist() for one in report.changes if one.rows is not None
        }
        rank = max(1, report.rank)
        lasts = sorted({name.rpartition(".")[2] for name in adapters})
        lora_set = BonsaiLoraSet(
            LoraRegistry(LoraConfig(rank, float(rank), 0.0, tuple(lasts))).add_all(adapters),
            self.base.name,
            self.name,
            MappingProxyType(dict(replaced)),
        )
        config = extracted_config(
            self.base.name,
            adapters,
            replaced,
            rows,
            [one.module for one in self.pairs],
            is_transposed=extraction.is_transposed(self.base, report.changes),
        )
        wanted = NextVersion(
            lora_set=lora_set, origin="extracted", previous=None, adapter_config=config
        )
        return store_new(store, wanted)


def plan(
    store: SetView,
    bases: BaseFolder,
    name: str,
    base_name: str,
    tuned_name: str,
    rank: int | None,
    energy: float | None,
    modules: Sequence[str],
) -> Plan:
    """Check an extraction, and return what is to be computed.

    Raises ForbiddenError, InvalidNameError, SetExistsError, BaseNotFoundError, InvalidBaseError,
    InvalidRequestError, ShapeMismatchError, RankTooLargeError.
    """
    check_scope(store.key, "read")
    store.check_name(name)
    refuse_existing(store, name)
    if rank is None and energy is None:
        raise InvalidRequestError("rank and energy are missing; send one of them", field="rank")
    highest = rank if rank is not None else min(_MOST_RANK, store.limits.max_rank)
    store.limits.check_rank(highest)
    base, tuned = bases.get(base_name), bases.get(tuned_name)
    pairs = extraction.pairs_of(base, tuned, modules)
    return Plan(name, base, tuned, pairs, Size(highest, energy))
