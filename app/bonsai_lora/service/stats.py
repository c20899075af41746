"""Statistics of the store."""

from dataclasses import dataclass

from bonsai_lora.service.view import SetView
from bonsai_lora.storage.residency import resident_bytes
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
    as_of: str | None
    """When the index with the largest sets was made (RFC 3339); None if they are current."""


def store_stats(store: SetView) -> StoreStats:
    """Return the statistics of all sets."""
    sums, largest = store.sums(), store.largest(LARGEST_SETS)
    return StoreStats(
        sums.sets,
        len(store.bad_files()),
        sums.newer,
        sums.adapters,
        sums.params,
        sums.held_bytes,
        sum(resident_bytes(one.file) for one in store.open_sets()),
        largest.records,
        largest.as_of,
    )
