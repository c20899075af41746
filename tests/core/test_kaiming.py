import json

import numpy as np
import pytest
import reference
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.core.kaiming import kaiming_uniform, xorshift64

CASES = json.loads((DATA / "reference-init.json").read_text())["cases"]


def _fnv1a64(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & (2**64 - 1)
    return f"{value:016x}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['d_in']}x{c['d_out']}r{c['rank']}")
def test_equals_the_compiled_reference_bit_for_bit(case):
    a_matrix = kaiming_uniform(case["d_in"], case["d_out"], case["rank"])
    bits = [f"{word:08x}" for word in a_matrix.reshape(-1).view(np.uint32)]
    assert a_matrix.shape == (case["rank"], case["d_in"])
    assert bits[: len(case["first"])] == case["first"]
    assert bits[::-1][: len(case["last_reversed"])] == case["last_reversed"]
    assert _fnv1a64(a_matrix.tobytes()) == case["fnv1a64"]


@given(st.integers(0, 80), st.integers(0, 80), st.integers(0, 9))
@settings(max_examples=60)
def test_equals_the_slow_oracle(d_in, d_out, rank):
    expected = reference.initial_a(d_in, d_out, rank)
    assert np.array_equal(
        kaiming_uniform(d_in, d_out, rank).view(np.uint32), expected.view(np.uint32)
    )


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
@settings(max_examples=60)
def test_stream_equals_single_steps(seed, count):
    assert xorshift64(seed, count).tolist() == reference.xorshift64(seed, count)


def test_zero_seed_stays_zero():
    # d_in 0, d_out 2^64 - 1: the seed wraps to 0, from which the generator never leaves.
    assert not xorshift64(0, 100).any()


def test_is_cached_and_read_only():
    first = kaiming_uniform(64, 64, 4)
    assert kaiming_uniform(64, 64, 4) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
