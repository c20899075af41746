"""Long lists in JSON text are parsed in pieces, to what the whole text would be parsed to."""

import json as standard
import random
import resource

import numpy as np
import orjson
import pytest

from bonsai_lora.errors import BonsaiLoraError, InvalidRequestError, MalformedJsonError
from bonsai_lora.wire import json, long_lists

MIB = 1 << 20
SPACES = ["", " ", "\n", "\t ", "\r\n"]
NUMBERS = ["0", "-1", "2.5", "1e-3", "12345678901234567890123", "9007199254740993", "1E+5"]
OTHERS = ["null", "true", "NaN", "-Infinity"]


def spaced(rng, parts):
    return "".join(rng.choice(SPACES) + one for one in parts)


def list_of(rng, elements):
    parts = ["["]
    for number, one in enumerate(elements):
        parts += [","] * (number > 0) + [one]
    return spaced(rng, [*parts, "]"])


@pytest.mark.parametrize("seed", range(40))
def test_any_text_has_the_same_value_as_a_whole(seed, monkeypatch):
    rng = random.Random(seed)
    for name in ("_LONG_BYTES", "_PIECE_BYTES", "_BLOCK_BYTES"):
        monkeypatch.setattr(long_lists, name, rng.randrange(1, 60))
    monkeypatch.setattr(json, "_LONG_TEXT_BYTES", 0)
    values = NUMBERS + OTHERS * rng.randrange(2)
    rows = [[rng.choice(values) for _ in range(rng.randrange(9))] for _ in range(rng.randrange(9))]
    flat = list_of(rng, rng.choices(values, k=30))
    deep = list_of(rng, [list_of(rng, one) for one in rows])
    deeper = list_of(rng, [deep, flat])
    text = f'{{"a": {flat}, "b":{deep} , "c": {{"d": {deeper}}}, "e": ["x", {flat}, 5]}}'
    for one in (text, broken(rng, text), broken(rng, text)):
        assert read(json.decode, one) == read(standard.loads, one), one


def broken(rng, text):
    """Return the text with a character too many, too few, or in the wrong place."""
    place = rng.randrange(len(text))
    return text[:place] + rng.choice(["", ",", "[", "]", "1", " ", '"']) + text[place + 1 :]


def read(parse, text):
    """Return what the text is read as, all numbers as float64."""
    try:
        return repr(in_doubles(parse(text.encode())))
    except (BonsaiLoraError, ValueError):
        return "refused"


def in_doubles(value):
    if isinstance(value, list):
        return [in_doubles(one) for one in value]
    if isinstance(value, dict):
        return {key: in_doubles(one) for key, one in value.items()}
    return float(value) if type(value) is int else value


LONG = {
    "numbers": "[" + "1," * (8 * MIB - 100) + "1]",
    "one null": "[" + "1," * (8 * MIB - 100) + "null]",
    "NaN": "[" + "1," * (8 * MIB - 100) + "NaN]",
    "22 digits": "[" + "0.1234567890123456789012, " * (MIB // 2) + "1]",
    "rows": "[" + "[1,2.5,NaN],\n" * (MIB // 6) + "[1,2,3]]",
    "a string": "[" + "1," * (8 * MIB - 100) + '"a"]',
    "a string first": '["a"' + ",1" * (8 * MIB - 100) + "]",
    "lists of lists": "[[" + "[1,2]," * MIB + "[3]]]",
    "not JSON": "[" + "1," * (8 * MIB - 100) + "1]]",
    "two commas": "[" + "1," * (8 * MIB - 100) + ",1]",
    "no end": "[" + "1," * (8 * MIB - 100) + "1",
}
REFUSALS = {
    "a string": InvalidRequestError,
    "a string first": InvalidRequestError,
    "lists of lists": InvalidRequestError,
    "not JSON": MalformedJsonError,
    "two commas": MalformedJsonError,
    "no end": MalformedJsonError,
}
"""As for short lists: 422 for JSON that is no tensor, 400 for what is not JSON."""


@pytest.mark.parametrize("field", ["inputs", "other"])
@pytest.mark.parametrize("name", LONG)
def test_no_long_list_is_parsed_at_once(name, field, monkeypatch):
    """orjson lets no other thread run meanwhile, nor does the json module."""
    longest = 0

    def noted(parse):
        def call(text, **options):
            nonlocal longest
            longest = max(longest, len(text))
            return parse(text, **options)

        return call

    monkeypatch.setattr(orjson, "loads", noted(orjson.loads))
    monkeypatch.setattr(standard, "loads", noted(standard.loads))
    monkeypatch.setattr(json, "_MOST_LISTS", 1 << 30)
    text = f'{{"{field}": {LONG[name]}}}'.encode()
    if name in REFUSALS:
        with pytest.raises(REFUSALS[name], match="characters from character"):
            json.decode_with_arrays(text)
    else:
        values = json.decode_with_arrays(text)[field]
        assert len(values) == LONG[name].count("]," if name == "rows" else ",") + 1
    assert longest <= 1 << 17


@pytest.mark.parametrize("gap", [" ", "\n"])
def test_white_space_may_be_long(gap):
    text = f'{{{gap * 5 * MIB}"inputs": [1]}}'
    assert json.decode(text.encode()) == {"inputs": [1]}


def test_bytes_that_are_not_text_are_malformed():
    with pytest.raises(MalformedJsonError):
        json.decode(bytes(5 * MIB))


@pytest.mark.parametrize(
    "odd", ['"' + "x" * 5000 + '"', '{"a": 1}', "[1]", "true", "null", str(10**4000)]
)
@pytest.mark.parametrize("is_deep", [False, True])
def test_one_odd_element_takes_no_more_memory_than_the_others(odd, is_deep):
    """NumPy would make all elements as long as the longest string: 2 GB of a body of 1 MB."""
    numbers = "[" + "1," * 100_000 + odd + "]"
    text = f'{{"inputs": {f"[{numbers}]" if is_deep else numbers}}}'.encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BonsaiLoraError):
        json.decode_tensor(json.decode_with_arrays(text)["inputs"], "inputs")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("rows", [None, 3, 40_000])
def test_pieces_of_a_list_become_one_tensor(rows):
    count = 120_000
    numbers = [number / 8 - 5 for number in range(count)]
    width = count // (rows or 1)
    value = [numbers[at : at + width] for at in range(0, count, width)] if rows else numbers
    expected = np.array(value, np.float32)
    found = json.decode_tensor(value, "inputs")
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
