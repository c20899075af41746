"""A short form of `make soak`."""

from soak import soak


def test_kills_mutated_requests_and_overload_for_three_seconds():
    figures = dict(soak(3, seed=1))
    assert figures["wrong"] == []
    assert figures["applies right to the bit"] > 0
    assert figures["changes acknowledged"] > 0
    assert figures["sets compared at the end"] > 0
    assert figures["mutated requests"] > 0
