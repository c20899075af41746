"""JSON parsed with arrays equals JSON parsed with lists."""

import json as standard

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.core import backend
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.wire import json

PAD = " " * 1100  # longer than texts that are parsed into lists

number = st.one_of(
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -0.0, 1e300, 3.5e38, 2**64 - 1, 2**63, 10**30, 2**60 + 2**36 + 1]),
)
element = st.one_of(
    number,
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.just("["),
    st.lists(number, max_size=2),
)
row = st.one_of(st.lists(number, max_size=4), st.lists(element, max_size=4), element)
value = st.one_of(st.lists(row, max_size=4), st.lists(number, max_size=6), element)


@pytest.fixture(autouse=True)
def _shortest_lists(monkeypatch):
    """Make every list of numbers an array."""
    monkeypatch.setattr(json, "_LEAST_NUMBERS", 1)


def tensor(body, *, fast):
    """What becomes of `inputs`: its bits, or the code and words of the refusal."""
    try:
        read = json.decode_with_arrays(body) if fast else json.decode(body)
        array = json.decode_tensor(read["inputs"], "inputs")
        return array.shape, array.tobytes()
    except BonsaiLoraError as error:
        return error.code, str(error)


@settings(max_examples=400)
@given(value)
def test_both_readers_agree(inputs):
    body = (standard.dumps({"inputs": inputs}) + PAD).encode()
    assert tensor(body, fast=True) == tensor(body, fast=False)


@pytest.mark.parametrize(
    "text",
    [
        '{"inputs": [1, 2], "a\\u0000b": 1}',
        '{"inputs": [1, 2], "inputs": [3]}',
        '{"inputs": [3], "inputs": [1, 2]}',
        '{"inputs": {"k": [1, 2, 3], "k\\u0000": [1, null, 3]}}',
        '\ufeff{"inputs": [1, 2]}',
        '{"inputs": [[1, [2]], [3, 4]]}',
        '{"inputs": [[[1]], [[2]]]}',
        '{"inputs": [1, NaN]}',
        '{"inputs": [1e400]}',
        '{"inputs": [[], []]}',
        '{"inputs": [[1, 2], [3, true]]}',
        '{"inputs": "[[[", "data": ["[", "]"]}',
        '{"inputs": [1, 2]',
        '{"inputs": [1, 2]]}',
        '{"inputs": [1, 2][3]}',
        '{"inputs": -[1, 2]}',
        '{"inputs": {[1, 2]}}',
        '{"inputs": {[1, 2]: 3}}',
        "[]",
        "[1, 2]",
        '{"inputs": [01]}',
        '{"sets": [1, 2], "inputs": [3]}',
        # In strings, and after a backslash.
        '{"inputs": "[1, 2]", "data": "x[3]y"}',
        '{"inputs": "\\\\[1, 2]"}',
        '{"inputs": "\\[1, 2]"}',
        '{"inputs": "\\"[1, 2]\\""}',
        '{"inputs": \\[1, 2]}',
        '{"in[1]puts": [1], "[2]": 3}',
        '{"inputs": [1, 2], "x": "\\ud800"}',
        '{"inputs": ' + 2000 * "[" + "1" + 2000 * "]" + "}",
        '{"inputs": ' + 900 * "[" + "1" + 900 * "]" + "}",
        '{"inputs": ' + 900 * '{"a":' + "[1]" + 900 * "}" + "}",
    ],
)
def test_unusual_json(text):
    body = (text + PAD).encode()

    def read(reader):
        try:
            return standard.dumps(reader(body), default=lambda array: array.tolist())
        except BonsaiLoraError as error:
            return error.code, str(error)
        except RecursionError:  # of what compares here
            return "deep"

    def loose(found):  # arrays are of floats
        return found.replace(".0", "") if isinstance(found, str) else found

    assert loose(read(json.decode_with_arrays)) == loose(read(json.decode))


@pytest.mark.skipif(backend.running() is None, reason="orjson reads them with the rest")
def test_numbers_become_arrays():
    body = (standard.dumps({"inputs": {"q": [[1, 2.5], [3, -4]]}, "id": [""]}) + PAD).encode()
    read = json.decode_with_arrays(body)
    assert isinstance(read["inputs"]["q"], np.ndarray)
    assert read["inputs"]["q"].dtype == np.float32
    assert read["inputs"]["q"].tolist() == [[1.0, 2.5], [3.0, -4.0]]
    assert read["id"] == [""]


def test_placeholders_cannot_be_forged():
    other = b'{"inputs": {"%b": 0}, "data": [1]}' % (b"0" * len(json._PLACEHOLDER))
    read = json.decode_with_arrays(other + PAD.encode())
    assert read["inputs"] == {"0" * len(json._PLACEHOLDER): 0}


def test_arrays_are_written_in_place():
    rows = np.array([[1.5, 2], [3, 4]], np.float32)
    value = {"a": "x", "b": rows, "c": {"d": rows[0], "e": [rows[:, 1], None]}}
    assert standard.loads(b"".join(json.encode(value))) == {
        "a": "x",
        "b": [[1.5, 2.0], [3.0, 4.0]],
        "c": {"d": [1.5, 2.0], "e": [[2.0, 4.0], None]},
    }
    assert b"".join(json.encode({"a": 1})) == b'{"a":1}'


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("[[1, 2], [3, [4]]]", "inputs[1][1] is a list; expected a number"),
        ("[3, [1]]", "inputs[1] is a list; expected a number"),
        ("[[1], 3]", "inputs[1] is a number, but inputs[0] is a list"),
        ("[[1], [1, 2]]", "row 1 of 'inputs' has 2 numbers, but row 0 has 1"),
        ("[[1, 2], [1]]", "row 1 of 'inputs' has 1 number, but row 0 has 2"),
        ("[[[1], [2, 3]]]", "inputs[0][0] is a list; expected a number"),
        ("[[[1], [2]]]", "inputs[0][0] is a list; expected a number"),
        (f"[1, {10**400}]", "inputs[1] is infinite as a float32"),
        (f"[[1, 2], [3, {-(10**400)}]]", "inputs[1][1] is infinite as a float32"),
        (f"[[[1], [{10**400}]]]", "inputs[0][0] is a list; expected a number"),
        (f"[{2**70}, NaN]", "inputs[1] is NaN"),
        (f"[{10**400}, null]", "inputs[1] is null; expected a number"),
        ("[[1, true]]", "inputs[0][1] is a boolean; expected a number"),
        ("[1, false]", "inputs[1] is a boolean; expected a number"),
        ('"1"', "'inputs' is a string; expected a list of numbers"),
    ],
)
@pytest.mark.parametrize("pad", ["", PAD])
def test_errors_name_the_index(inputs, words, pad):
    body = (f'{{"inputs": {inputs}}}' + pad).encode()
    with pytest.raises(BonsaiLoraError) as refused:
        read = json.decode_with_arrays(body)
        json.decode_tensor(read["inputs"], "inputs")
    assert str(refused.value).startswith(words)


def test_integers_beyond_64_bits_are_numbers():
    body = f'{{"inputs": [{2**70}, 5], "id": NaN}}'.encode()  # which orjson does not read
    read = json.decode_with_arrays(body)
    assert json.decode_tensor(read["inputs"], "inputs").tolist() == [2.0**70, 5]
