"""Keys and rates as pure logic."""

import math

import pytest

from bonsai_lora.errors import RateLimitedError
from bonsai_lora.service.keys import (
    ANYONE,
    NOBODY,
    SCOPES,
    Key,
    KeyRing,
    Meter,
    Rates,
    digest_of,
    may,
    new_token,
)
from bonsai_lora.service.rates import TokenBucket


def key(scopes=("read",), prefixes=("acme.",), token=b"", **more):
    return Key("a" * 8, digest_of(token), frozenset(scopes), tuple(prefixes), **more)


@pytest.mark.parametrize(
    ("scopes", "prefixes", "scope", "name", "allowed"),
    [
        (["read"], ["acme."], "read", "acme.x", True),
        (["read"], ["acme."], "read", "acme.", True),
        (["read"], ["acme."], "read", "acme", False),
        (["read"], ["acme."], "read", "acmex", False),
        (["read"], ["acme."], "read", "Acme.x", False),
        (["read"], ["acme."], "read", "x.acme.", False),
        (["read"], ["acme."], "apply", "acme.x", False),
        (["read", "apply"], ["b-", "acme."], "apply", "acme.x", True),
        (["read"], [""], "read", "anything", True),
        (["read"], [], "read", "anything", False),
        (["admin"], [], "admin", "anything", True),
        (["admin"], [], "read", "anything", False),
        (["admin", "read"], ["acme."], "read", "anything", True),
    ],
)
def test_may(scopes, prefixes, scope, name, allowed):
    assert may(key(scopes, prefixes), scope, name) is allowed


def test_anyone_may_everything_and_nobody_nothing():
    for scope in SCOPES:
        assert may(ANYONE, scope, "x")
        assert not may(NOBODY, scope, "x")
    assert not NOBODY.sees_all


def test_a_key_is_found_by_its_whole_token_only():
    number, token = new_token()
    known = Key(number, digest_of(token.encode()), frozenset({"read"}), ("",))
    ring = KeyRing({number: known})
    assert ring.find(token.encode()) is known
    for wrong in (token[:-1], f"{token}x", token.upper(), f" {token}", f"{token}\n", number, ""):
        assert ring.find(wrong.encode()) is None
    assert ring.find(b"\xff" + token.encode()) is None
    other = token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB")
    assert ring.find(other.encode()) is None
    assert len({new_token()[1] for _ in range(100)}) == 100


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_bucket_lets_its_rate_through():
    clock = Clock()
    bucket = TokenBucket(8, clock)
    assert [bucket.take(1) for _ in range(9)] == [0] * 8 + [1]
    clock.now += 0.125
    assert [bucket.take(1), bucket.take(1)] == [0, 1]
    clock.now += 1000  # it never holds more than a second's worth
    assert [bucket.take(8), bucket.take(1)] == [0, 1]


def test_more_than_a_second_is_worth_passes_once_the_bucket_is_full_and_is_waited_for():
    clock = Clock()
    bucket = TokenBucket(8, clock)
    assert bucket.take(40) == 0
    assert bucket.take(1) == 5  # 32 are owed
    clock.now += 4
    assert bucket.take(1) == 1
    clock.now += 0.125
    assert bucket.take(1) == 0


def test_rates_below_one_still_let_one_through():
    clock = Clock()
    bucket = TokenBucket(0.125, clock)
    assert bucket.take(1) == 0
    assert bucket.take(1) == 8
    clock.now += 8
    assert bucket.take(1) == 0


def test_a_meter_counts_a_share_of_the_rates():
    meter = Meter(key(rates=Rates(requests_per_second=4, rows_per_second=None)), share=0.5)
    meter.take_rows(10**9)
    meter.take_request()
    meter.take_request()
    with pytest.raises(RateLimitedError) as caught:
        meter.take_request()
    assert caught.value.values["limit"] == "requests_per_second"
    assert caught.value.values["retry_seconds"] == 1
    assert key().expires_at == math.inf
