"""A short form of the part of `make soak` that is over a bucket."""

import pytest
from soak_bucket import soak_bucket

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_services_over_one_bucket_that_are_killed_lose_nothing():
    figures = dict(soak_bucket(10, seed=1))
    print({name: value for name, value in figures.items() if name != "wrong"})
    assert figures["wrong"] == []
    assert figures["services killed"] + figures["workers killed"] > 0
    for counted in (
        "applies right to the bit",
        "blobs removed by gc",
        "changes acknowledged",
        "modules compared at the end",
        "numbers acknowledged",
        "sets compared at the end",
    ):
        assert figures[counted] > 0
