"""Statistics of the store."""

from dataclasses import dataclass

from bonsai_lora.service.view import SetView
from bonsai_lora.storage.setfile import SetRecord

LARGEST_SETS = 100
"""Most sets that the store's statistics list."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Totals over all sets, and the largest sets."""

    set_count: int
    bad_file_count: int
    """Files that could not be read."""
    newer_file_count: int
    """Files that a newer release wrote; they are not counted as sets."""
    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    resident_bytes: int
    largest: list[SetRecord]


def store_stats(store: SetView) -> StoreStats:
    """Return the statistics of all sets."""
    records = store.records()
    return StoreStats(
        len(records),
        len(store.bad_files()),
        len(store.newer_files()),
        sum(one.adapter_count for one in records),
        sum(one.total_trainable_params for one in records),
        sum(one.total_memory_bytes for one in records),
        sum(one.resident_bytes() for one in store.open_sets()),
        sorted(records, key=lambda one: -one.total_memory_bytes)[:LARGEST_SETS],
    )
