"""Garbage collections of all objects stop all threads, so they are rare."""

import gc

import pytest

from bonsai_lora.cli import serve


@pytest.fixture
def collector():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def full_collections():
    return gc.get_stats()[2]["collections"]


def test_the_objects_of_a_large_set_are_made_without_a_full_collection(collector):
    """As many as 32,000 modules have; with Python's own thresholds there are about ten."""
    serve._collect_rarely()
    before = full_collections()
    kept = [{"number": [number]} for number in range(600_000)]
    assert len(kept) == 600_000
    assert full_collections() == before
