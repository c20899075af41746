"""JSON read by simdjson is what the ordinary reader makes of it, or goes to that one."""

import json as standard

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import BonsaiLoraError
from app.wire import json

simdjson = pytest.importorskip("simdjson", reason="no wheel for this Python")

PAD = " " * 1100  # longer than what is read the ordinary way

number = st.one_of(
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
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


def tensor(body, *, fast):
    """What becomes of `inputs`: its bits, or the code of the refusal."""
    try:
        read = json.decode_with_arrays(body) if fast else json.decode(body)
        array = json.decode_tensor(read["inputs"], "inputs", json.Text(body))
        return array.shape, array.tobytes()
    except BonsaiLoraError as error:
        return error.code


@settings(max_examples=400, deadline=None)
@given(value)
def test_both_readers_agree(inputs):
    body = (standard.dumps({"inputs": inputs}) + PAD).encode()
    assert tensor(body, fast=True) == tensor(body, fast=False)


@pytest.mark.parametrize(
    "text",
    [
        '{"inputs": [1, 2], "a\\u0000b": 1}',
        '{"inputs": [1, 2], "inputs": [3]}',
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
        "[]",
        '{"inputs": [01]}',
    ],
)
def test_what_is_uncommon(text):
    body = (text + PAD).encode()

    def read(reader):
        try:
            return standard.dumps(reader(body), default=lambda array: array.tolist())
        except BonsaiLoraError as error:
            return error.code

    assert read(json.decode_with_arrays) == read(json.decode)


def test_numbers_become_arrays():
    body = (standard.dumps({"inputs": {"q": [[1, 2.5], [3, -4]]}, "sets": [1, 2]}) + PAD).encode()
    read = json.decode_with_arrays(body)
    assert isinstance(read["inputs"]["q"], np.ndarray)
    assert read["inputs"]["q"].tolist() == [[1.0, 2.5], [3.0, -4.0]]
    assert read["sets"] == [1, 2]
