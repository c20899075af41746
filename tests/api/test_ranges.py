import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonsai_lora.api.ranges import MAX_RANGES, parse_ranges
from bonsai_lora.errors import RangeNotSatisfiableError


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", [(0, 1)]),
        ("bytes=0-99", [(0, 10)]),
        ("bytes=0-100000", [(0, 10)]),
        ("bytes=5-", [(5, 10)]),
        ("bytes=-3", [(7, 10)]),
        ("bytes=-99", [(0, 10)]),
        ("bytes=0-1, 4-5 ,-1", [(0, 2), (4, 6), (9, 10)]),
        ("bytes=20-30,1-2", [(1, 3)]),
        ("BYTES = 1-2", [(1, 3)]),
        ("lines=1-2", None),
        ("bytes", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=3-1", None),
        ("bytes=a-b", None),
        ("bytes=1-2;3", None),
        ("bytes=" + ",".join(["0-0"] * (MAX_RANGES + 1)), None),
    ],
)
def test_ranges(header, expected):
    assert parse_ranges(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-20", "bytes=-0", "bytes=11-,12-"])
def test_ranges_beyond_the_end(header):
    with pytest.raises(RangeNotSatisfiableError):
        parse_ranges(header, 10)


@given(st.text(alphabet="bytes=0123456789-, ", max_size=40), st.integers(0, 50))
def test_any_header_gives_ranges_within_the_file(header, size):
    try:
        found = parse_ranges(header, size)
    except RangeNotSatisfiableError:
        return
    assert found is None or all(0 <= start < stop <= size for start, stop in found)
