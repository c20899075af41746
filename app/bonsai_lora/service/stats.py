"""Statistics of the store."""

from dataclasses import dataclass

from bonsai_lora.service.view import SetView
from bonsai_lora.storage.index import Sums
from bonsai_lora.storage.protocol import Page
from bonsai_lora.storage.residency import resident_bytes

LARGEST_SETS = 100
"""Most sets that the store's statistics list."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sums over the caller's sets, and the largest of them."""

    sums: Sums
    bad_file_count: int
    """Files that could not be read."""
    resident_bytes: int
    """Of the sets that this process has open."""
    largest: Page


def store_stats(store: SetView) -> StoreStats:
    """Return the statistics of the caller's sets."""
    return StoreStats(
        store.sums(),
        len(store.bad_files()),
        sum(resident_bytes(one.file) for one in store.open_sets()),
        store.largest(LARGEST_SETS),
    )
