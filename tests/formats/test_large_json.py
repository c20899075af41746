"""JSON in pieces reads and writes what the json module does, and lets other threads run."""

import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonsai_lora.errors import MalformedSafetensorsError
from bonsai_lora.formats import large_json, safetensors
from bonsai_lora.formats.large_json import ObjectReader, dump

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
FLAT = SCALARS | st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(SCALARS, lambda some: st.lists(some) | st.dictionaries(st.text(), some))
SPACE = st.sampled_from(["", " ", "\n\t\r "])


@given(VALUES, st.booleans(), st.integers(1, 3))
def test_what_is_written_is_what_json_writes(value, is_ascii, piece):
    before, large_json._PIECE = large_json._PIECE, piece
    try:
        for separators in (None, (",", ":")):
            options = {
                "ensure_ascii": is_ascii,
                **({"separators": separators} if separators else {}),
            }
            assert dump(value, **options) == json.dumps(value, **options)
    finally:
        large_json._PIECE = before


def read(text):
    reader = ObjectReader(text)
    found = {name: reader.value() for name in reader.names()}
    reader.end()
    return found


@given(
    st.dictionaries(st.text(), FLAT.filter(lambda one: one not in (float("inf"), -float("inf"))))
)
def test_what_is_read_is_what_json_reads(value):
    for indent in (None, 3):
        assert read(json.dumps(value, indent=indent)) == value


@given(st.text(alphabet='{}[]",:0123 \\un', max_size=12))
def test_what_json_refuses_is_refused(text):
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        expected = None
    if isinstance(expected, dict):
        try:
            found = read(text)
        except ValueError:  # nested, or with a key twice
            return
        assert found == expected
    else:
        with pytest.raises(ValueError, match=r"."):
            read(text)


@pytest.mark.parametrize("ends", ["[]", "{}"])
def test_a_value_has_4096_characters_at_most(ends):
    def text(spaces):
        return f'{{"a":{ends[0]}{" " * spaces}{ends[1]}}}'

    assert read(text(4094)) == {"a": json.loads(ends)}
    with pytest.raises(ValueError, match="a short value"):
        read(text(4095))


DEEP = 100_000
"""Deeper than any Python reads: 3.12 reads ten times as deep as 3.11."""


@pytest.mark.parametrize("text", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "0" + "}" * DEEP])
def test_a_value_that_is_nested_too_deeply_is_refused_like_all_others(text):
    with pytest.raises(ValueError, match="nested less deeply"):
        ObjectReader(text).any_value()
    with pytest.raises(ValueError, match=r"nested less deeply|a short value"):
        ObjectReader(text).value()


MANY = 300_000
FLAT_NAMES = "{" + ",".join(f'"{number}":0' for number in range(MANY)) + "}"
HOSTILE = {
    "names": FLAT_NAMES,
    "names in a tensor": f'{{"a":{FLAT_NAMES}}}',
    "names in the metadata": f'{{"__metadata__":{FLAT_NAMES}}}'.replace(":0", ':""'),
    "numbers in a tensor": f'{{"a":[{"0," * 10 * MANY}0]}}',
    "numbers in the metadata": f'{{"__metadata__":[{"0," * 10 * MANY}0]}}',
    "lists": f'{{"a":{"[" * MANY}{"]" * MANY}}}',
    "digits": f'{{"a":{"1" * 10 * MANY}}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name):
    raw = HOSTILE[name].encode()
    with pytest.raises(MalformedSafetensorsError):
        safetensors.decode_header(len(raw).to_bytes(8, "little") + raw)


def test_other_threads_run_while_a_long_header_is_read_and_written():
    names = [f"model.layers.{number}.self_attn.q_proj.lora_A.weight" for number in range(60_000)]
    layout = dict.fromkeys(reversed(names), ("F32", (2, 2)))

    def work():
        header = safetensors.encode_header(layout, {"a": "b"})
        assert len(safetensors.decode_header(header).tensors) == len(names)

    # More than once: a busy machine may stop the other thread at any moment.
    assert any(longest_turn(work) < 1 / 3 for _ in range(5))


def longest_turn(work):
    """The most processor time that `work` takes while no other thread runs, as a part of all."""
    done, used = threading.Event(), []
    clock = time.pthread_getcpuclockid(threading.get_ident())

    def watch():
        while not done.is_set():
            time.sleep(0)
            used.append(time.clock_gettime(clock))

    watching = threading.Thread(target=watch)
    watching.start()
    used.append(time.clock_gettime(clock))
    work()
    used.append(time.clock_gettime(clock))
    done.set()
    watching.join()
    return max(map(float.__sub__, used[1:], used)) / (used[-1] - used[0])
