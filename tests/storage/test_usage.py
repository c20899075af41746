"""Sums over the sets of a bucket, which many machines change at once."""

import pytest
from obstore.store import MemoryStore

from bonsai_lora.errors import ChangedMeanwhileError, StoreFullError
from bonsai_lora.storage import usage
from bonsai_lora.storage.bucket import Bucket, ConflictError
from bonsai_lora.storage.index import Sums
from bonsai_lora.storage.usage import Usage


class Contended(Bucket):
    """A bucket in which others are faster for the first `conflicts` writes."""

    conflicts = 0

    def put(self, key, body, *, replaces):
        if self.conflicts:
            self.conflicts -= 1
            raise ConflictError
        return super().put(key, body, replaces=replaces)


@pytest.fixture
def bucket():
    return Contended(MemoryStore())


@pytest.fixture
def waits(monkeypatch):
    """The pauses between attempts, each as long as it can be."""
    found = []
    monkeypatch.setattr(usage.random, "uniform", lambda least, most: (least, most))
    monkeypatch.setattr(usage.time, "sleep", found.append)
    return found


def usage_of(bucket):
    return Usage(bucket, 60, lambda _: Sums())


def test_a_change_that_meets_others_waits_longer_each_time(bucket, waits):
    sums = usage_of(bucket)
    sums.sums("")
    bucket.conflicts = 4
    sums.change("s", Sums(sets=1), lambda: None)
    assert waits == [(0, 0.02), (0, 0.04), (0, 0.08), (0, 0.16)]
    assert usage_of(bucket).sums("").sets == 1


def test_a_change_is_given_up_after_twelve_attempts(bucket, waits):
    sums = usage_of(bucket)
    sums.sums("")
    bucket.conflicts = 12
    with pytest.raises(ChangedMeanwhileError):
        sums.change("s", Sums(sets=1), lambda: None)
    assert max(waits)[1] < 1
    assert usage_of(bucket).sums("").sets == 0


def test_a_change_that_is_refused_is_not_tried_again(bucket, waits):
    sums = usage_of(bucket)

    def refuse():
        raise StoreFullError("no")

    with pytest.raises(StoreFullError):
        sums.change("s", Sums(sets=1), refuse)
    assert waits == []
    assert usage_of(bucket).sums("").sets == 0


def test_sums_are_changed_for_every_start_of_the_name(bucket):
    sums = usage_of(bucket)
    starts = ("", "a", "a.", "a.b", "b")
    for start in starts:
        sums.sums(start)
    sums.change("a.b", Sums(sets=1, held_bytes=7), lambda: None)
    sums.change("ab", Sums(sets=1, held_bytes=1), lambda: None)
    assert {start: usage_of(bucket).sums(start).held_bytes for start in starts} == {
        "": 8,
        "a": 8,
        "a.": 7,
        "a.b": 7,
        "b": 0,
    }
