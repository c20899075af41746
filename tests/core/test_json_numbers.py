"""Numbers in JSON are read as Python reads them, and written as orjson does, on every CPU."""

import ctypes
import json
import math
import mmap
import re
import sys
from decimal import Decimal

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import HOST

from bonsai_lora.core import backend, definition
from bonsai_lora.core.backend import find_lists, list_of
from bonsai_lora.kernels import library
from bonsai_lora.kernels.arrays import ArrayKernels
from bonsai_lora.kernels.powers import LEAST, MOST, power_of_ten
from bonsai_lora.kernels.write_json import text_bytes

FAR = b" " * 64
"""Around a text, so that its numbers are looked at many characters at a time."""


@pytest.fixture
def _target(kernels, monkeypatch):
    monkeypatch.setattr(backend, "running", lambda: kernels)


on_targets = pytest.mark.usefixtures("_target")


def read(text: bytes):
    """What is read of a list, with and without room around it: its bits, or None."""
    found = []
    for before, after in ((b"", b""), (FAR, FAR), (FAR, b""), (b"", FAR)):
        lists = find_lists(before + text + after, 1)
        whole = [one for one in lists if one.start == len(before)]
        found.append(whole[0].numbers if whole else None)
        assert not whole or (before + text + after)[whole[0].end - 1 :].strip() == b"]"
    kinds = {None if one is None else (one.shape, one.tobytes()) for one in found}
    assert len(kinds) == 1, text
    return found[0]


def float32_of(numbers) -> bytes:
    """The bits that Python and NumPy make of numbers' texts."""
    with np.errstate(over="ignore"):
        return np.array([float(json.loads(one)) for one in numbers]).astype(np.float32).tobytes()


def check_read(numbers: list[str]) -> None:
    got = read(f"[{','.join(numbers)}]".encode())
    assert got is not None, numbers
    assert got.tobytes() == float32_of(numbers), numbers


def random_floats(count: int) -> np.ndarray:
    bits = np.random.default_rng(5).integers(0, 2**32, count, np.uint32, endpoint=False)
    floats = bits.view(np.float32)
    return floats[np.isfinite(floats)]


def edges() -> np.ndarray:
    """Powers of two and of ten, and what is next to each; the least and the largest."""
    bits = np.arange(256, dtype=np.uint32)[:, None] << 23
    near = (bits + np.array([0, 1, 2, 0x7FFFFF, 0x400000], np.uint32)).reshape(-1)
    floats = near.astype(np.uint32).view(np.float32)
    tens = np.array([float(f"1e{power}") for power in range(-45, 39)], np.float32)
    floats = np.concatenate(
        [floats, tens, np.nextafter(tens, np.float32(0)), np.nextafter(tens, np.float32(np.inf))]
    )
    floats = np.concatenate([floats, -floats, np.arange(-5000, 5000, dtype=np.float32) / 100])
    return floats[np.isfinite(floats)]


# Reading


@on_targets
def test_floats_are_read_as_they_were_written():
    floats = np.concatenate([edges(), random_floats(20_000)])
    for text in (
        orjson.dumps(floats, option=orjson.OPT_SERIALIZE_NUMPY),
        json.dumps(floats.tolist()).encode(),  # 17 digits, and a space after each comma
    ):
        assert read(text).tobytes() == floats.tobytes()


@on_targets
def test_doubles_are_rounded_twice_as_elsewhere():
    rng = np.random.default_rng(1)
    doubles = rng.standard_normal(20_000) * 10.0 ** rng.integers(-280, 39, 20_000)
    check_read([repr(float(one)) for one in doubles])


@on_targets
def test_what_is_in_the_middle_of_two_doubles():
    numbers = []
    for power in range(-4, 24):
        for odd in range(3, 2000, 14):
            # Such a multiple of 5^power has 54 bits, and the last one is set.
            five = 5 ** abs(power)
            low, high = (
                (2**53 // five, 2**54 // five) if power >= 0 else (2**53 * five, 2**54 * five)
            )
            digits = (low + (high - low) * odd // 2000) | 1
            if power < 0:
                digits = (digits // five | 1) * five
            if digits < 2**64 and low < digits < high:
                numbers.append(f"{digits}e{power}")
    assert len(numbers) > 3000
    check_read(numbers)


@on_targets
def test_what_is_nearly_in_the_middle_of_two_float32():
    """There the last bit of the float64 decides; numbers as they may be written, of 17 to 20 digits."""
    rng = np.random.default_rng(8)
    low = np.exp2(rng.uniform(-100, 60, 4000)).astype(np.float32)
    middle = (low.astype(np.float64) + np.nextafter(low, np.float32(np.inf))) / 2
    numbers = []
    for one in middle.tolist():
        numbers += [repr(one), repr(math.nextafter(one, 0)), repr(math.nextafter(one, math.inf))]
        exact = Decimal(one)
        half = Decimal(math.ulp(one)) / 2
        for digits in (17, 18, 19):
            for off in (half, -half):
                numbers.append(f"{exact + off:.{digits - 1}e}")
    # In the middle of two float64, the even one of which is in the middle of two float32.
    for high in rng.integers(2**23, 2**24, 2000).tolist():
        digits = high << 30 | 1 << 29 | 1
        numbers += [f"{digits}.0", f"{digits}e3", f"{digits * 5**3}e-3", f"{digits * 5}0e-1"]
    small = [one for one in numbers if int(re.sub(r"e.*|[.]", "", one)) < 2**64]
    assert len(small) > 40_000
    check_read(small)


digits = st.text("0123456789", max_size=12)
numbers = st.builds(
    lambda sign, whole, fraction, exponent: sign + whole + fraction + exponent,
    st.sampled_from(["", "-"]),
    st.one_of(
        st.just("0"),
        st.builds("{}{}".format, st.sampled_from("123456789"), st.text("0123456789", max_size=8)),
    ),
    st.one_of(st.just(""), st.builds(".{}{}".format, st.sampled_from("0123456789"), digits)),
    st.one_of(
        st.just(""),
        st.builds(
            "{}{}{}".format,
            st.sampled_from("eE"),
            st.sampled_from(["", "+", "-", "-0", "+00"]),
            st.integers(0, 30),
        ),
    ),
)
space = st.text(" \t\n\r", max_size=2)


@settings(max_examples=300)
@given(st.lists(st.tuples(space, numbers, space), min_size=1, max_size=8))
def test_numbers_and_space_of_all_kinds(parts):
    text = ",".join(before + number + after for before, number, after in parts)
    got = read(f"[{text}]".encode())
    found = [number for _, number, _ in parts]
    if any(int(re.sub(r"[eE].*|[-.]", "", one)) > 18446744073709551609 for one in found):
        assert got is None
    else:
        assert got.tobytes() == float32_of(found)


@on_targets
@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("-0", 0.0),  # a whole number, which has no such zero
        ("-0.0", -0.0),
        ("0e99", 0.0),
        ("-0e-99", -0.0),
        ("0.000000000000000000000000", 0.0),
        ("9007199254740991", 2**53),
        ("123456789012", 123456789012),
        ("1e38", 1e38),
        ("1.5e39", np.inf),  # finite numbers are checked elsewhere
        ("0.1e-63", 1e-64),
        ("1.0000000596046448", 1.0),  # as a float64 it is in the middle of two
        ("0.00000000000000000000012345", 1.2345e-22),
        (
            "7.038531e-26",
            7.0385313e-26,
        ),  # the one float32 whose shortest decimal reads back as its neighbour
        ("0.0000000000799116987859616", 7.99117e-11),
        ("2.600895873828147e-15", 2.600895873828147e-15),
        ("7.107802111672320625e+14", 7.107802111672320625e14),
        ("0." + "0" * 990 + "1e991", 1.0),
        ("8.056256106669935e-08", 8.056256106669935e-08),
        ("1234567.8901234567890", 1234567.9),
    ],
)
def test_special_numbers(number, value):
    got = read(f"[{number},1]".encode())
    with np.errstate(over="ignore", under="ignore"):
        assert got.tobytes() == np.array([value, 1]).astype(np.float32).tobytes()


NO_NUMBERS = (
    "01 -01 00 1. - .5 +1 1e 1e+ 1.e5 --1 0x1 1.2.3 1e5.0 1_0 1/ 1: 1e--5 NaN Infinity true null"
)
# Numbers, but not read here: many digits, whole ones beyond 2^53, far powers of ten.
OTHERS = "1e18446744073709551609 1.5e-18446744073709551600 1.9999999999999999999 12.9999999999999999999999 9007199254740992 0.123456789012345678901 1e39 1e300 1e-301 18446744073709551616"


@on_targets
@pytest.mark.parametrize(
    "number",
    [
        *NO_NUMBERS.split(),
        *OTHERS.split(),
        "0." + "0" * 1000 + "1e1001",
        "",
        "1 2",
        '"1"',
        "\u0661",
    ],
)
def test_text_that_is_not_a_number(number):
    for text in (f"[{number}]", f"[1.5,{number},2]", f"[[1.5,2],[{number},2]]"):
        got = read(text.encode())
        assert got is None, text


@on_targets
def test_lists_of_lists_are_regular():
    assert read(b"[[1,2,3],[4,5,6]]").tolist() == [[1, 2, 3], [4, 5, 6]]
    assert read(b"[ [1 , 2 ] , [ 3,\n4] ]").tolist() == [[1, 2], [3, 4]]
    assert read(b"[[1]]").shape == (1, 1)
    for text in (b"[]", b"[[]]", b"[[],[]]", b"[[1],[2,3]]", b"[[1,2],3]", b"[1,[2]]", b"[[[1]]]"):
        assert read(text) is None, text
    for text in (b"[1,2", b"[1,2,", b"[[1,2]", b"[[1,2],", b"[[1,2],]", b"[1,]", b"[,1]", b"["):
        assert read(text) is None, text


def test_lists_are_found_where_they_are():
    text = b'{"a": [1, 2], "b": {"c": [[3, 4], [5, 6]], "d": "[7]"}, "e": [8, "x"], "f": [[9], 1]}'
    found = find_lists(text, 1)
    assert [json.loads(text[one.start : one.end]) for one in found] == [
        [1, 2],
        [[3, 4], [5, 6]],
        [7],
        [9],
    ]
    assert [one.numbers.tolist() for one in found[:2]] == [[1, 2], [[3, 4], [5, 6]]]
    assert [len(one.numbers) for one in find_lists(text, 3)] == [2]
    assert find_lists(b"", 1) == find_lists(b"{}", 1) == find_lists(b"[" * 100_000, 1) == []


@pytest.fixture
def _as_written(monkeypatch):
    """Kernels that LLVM does not change: what they read without using it is still read."""
    machine_code = library.machine_code
    monkeypatch.setattr(
        library, "machine_code", lambda text, target, _: machine_code(text, target, 0)
    )
    fresh = ArrayKernels(HOST)
    monkeypatch.setattr(backend, "running", lambda: fresh)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="mprotect(2) with Linux's numbers")


@on_linux
@on_targets
def test_nothing_around_a_text_is_read():
    check_reads_stay_inside()


@on_linux
@pytest.mark.usefixtures("_as_written")
def test_nor_would_it_be_without_optimisation():
    check_reads_stay_inside()


def check_reads_stay_inside():
    page = mmap.PAGESIZE
    with mmap.mmap(-1, 3 * page) as pages:
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        mprotect = ctypes.CDLL(None).mprotect
        for guard in (start, start + 2 * page):
            assert mprotect(ctypes.c_void_p(guard), page, 0) == 0
        inside = np.frombuffer(pages, np.uint8)[page : 2 * page]
        rng = np.random.default_rng(2)
        numbers = random_floats(200)
        short = np.round(rng.standard_normal(200), 1)
        for count in range(1, 200):
            for text in (
                orjson.dumps(numbers[:count], option=orjson.OPT_SERIALIZE_NUMPY),
                json.dumps(rng.standard_normal(min(count, 100)).tolist()).encode(),
                b"[" + b"1" * count,
                b" " * (count % 20) + json.dumps(short[:count].tolist()).encode(),
                b" " * count + b"[",
            ):
                inside[: len(text)] = np.frombuffer(text, np.uint8)
                at_the_start = find_lists(inside[: len(text)].data, 1)
                inside[-len(text) :] = np.frombuffer(text, np.uint8)
                at_the_end = find_lists(inside[-len(text) :].data, 1)
                assert len(at_the_start) == len(at_the_end) == text.endswith(b"]")
        del inside
        for guard in (start, start + 2 * page):
            mprotect(ctypes.c_void_p(guard), page, 3)


# Writing


@on_targets
def test_numbers_are_written_as_orjson_does():
    rng = np.random.default_rng(6)
    plain = (10.0 ** rng.uniform(-8, 14, 20_000)).astype(np.float32)
    floats = np.concatenate([edges(), random_floats(20_000), plain, np.round(plain)])
    text = bytes(list_of(floats))
    assert text == bytes(definition.list_of(floats))
    back = np.array([np.float32(one) for one in text[1:-1].split(b",")])
    assert back.tobytes() == floats.tobytes()


@on_targets
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 33])
def test_shapes_are_kept(count):
    rows = np.arange(3 * count, dtype=np.float32).reshape(3, count) / 8
    assert json.loads(bytes(list_of(rows))) == rows.tolist()
    assert json.loads(bytes(list_of(rows[:0]))) == []
    for row in rows:
        assert json.loads(bytes(list_of(row))) == row.tolist()
    assert json.loads(bytes(list_of(rows.T))) == rows.T.tolist()


def test_the_longest_numbers_have_room():
    bits = np.random.default_rng(3).integers(0x3727C5AC, 0x3731C5AC, 4000, np.uint32)
    longest = -bits.view(np.float32)  # from -1e-5 on: eight or nine digits behind five zeros
    text = bytes(list_of(longest))
    assert json.loads(text) == pytest.approx(longest.tolist(), rel=1e-7)
    size = max(map(len, text[1:-1].split(b",")))
    assert size == 16
    alike = np.full(5000, np.float32("-0.0000100000025"))
    assert len(list_of(alike)) == 5000 * 17 + 1 <= text_bytes(1, 5000)


def test_only_float32_is_written():
    for wrong in (np.zeros(3), np.zeros((1, 1, 1), np.float32)):
        with pytest.raises(ValueError, match="expected float32"):
            list_of(wrong)


def test_powers_of_ten_are_what_they_say():
    for exponent in range(LEAST, MOST + 1):
        bits = power_of_ten(exponent)
        assert bits.bit_length() == 128
        exact = 10 ** abs(exponent)
        if exponent >= 0:
            shift = 128 - exact.bit_length()
            assert bits == int(exact * 2**shift) if shift >= 0 else bits == exact >> -shift
        else:
            # The least that times the power is a power of two or more.
            power = 1 << (127 + exact.bit_length())
            assert (bits - 1) * exact < power <= bits * exact
