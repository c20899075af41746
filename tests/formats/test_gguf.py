"""The GGUF container: what is written is read, and hostile files are refused with a reason."""

import time
import tracemalloc

import gguf_files
import gguf_hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.errors import (
    BonsaiLoraError,
    HeaderTooLargeError,
    MalformedGgufError,
    UnsupportedGgufError,
)
from bonsai_lora.formats import gguf, gguf_writer
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.gguf_values import DTYPES, ValueType, read_array

VALID = gguf_hostile.VALID

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda kind: st.binary(min_size=8, max_size=8).map(
        lambda raw: (
            np.bool_(raw[0] & 1)
            if kind is ValueType.BOOL
            else np.nan_to_num(np.frombuffer(raw, DTYPES[kind])[0])
        )
    )
)
ARRAYS = st.builds(
    lambda first, count: np.full(count, first), NUMBERS, st.integers(0, 5)
) | st.lists(TEXTS, max_size=4)
PAIRS = st.dictionaries(TEXTS.filter(bool), NUMBERS | TEXTS | ARRAYS, max_size=6)
SHAPES = st.sampled_from([(), (0,), (256,), (3, 256), (2, 0, 256), (2, 1, 3, 256)])
KINDS = st.sampled_from(["F32", "Q8_0", "Q4_K", "Q1_0", "TQ1_0", "PQ2_0", "IQ2_XS", "I8"])
LAYOUTS = st.dictionaries(
    st.text("abc.é", max_size=30).filter(lambda name: len(name.encode()) < 64),
    st.tuples(KINDS, SHAPES),
    max_size=5,
).map(
    lambda layout: {
        name: (BY_NAME["F32" if shape == () else kind], shape)
        for name, (kind, shape) in layout.items()
    }
)


def opened(raw, **options):
    return gguf.read_header(gguf.reader_of(raw), len(raw), **options)


def content_of(raw, value):
    """A value as it was given to the writer."""
    if value.type is not ValueType.ARRAY:
        return value.content
    found = read_array(gguf.reader_of(raw), value)
    return found if isinstance(found, list) else found.tolist()


@given(PAIRS, LAYOUTS, st.sampled_from([None, 1, 8, 32, 256]))
@settings(max_examples=150)
def test_what_is_written_is_read(pairs, layout, alignment):
    if alignment is not None:
        pairs = {**pairs, "general.alignment": np.uint32(alignment)}
    plan = gguf_writer.plan(pairs, layout)
    raw = plan.head + bytes(plan.total_bytes - len(plan.head))
    header = opened(raw)
    assert dict(header.tensors) == dict(plan.tensors)
    assert [*header.tensors] == [*layout]
    assert [*header.pairs] == [*pairs]
    for key, value in pairs.items():
        got, want = (
            content_of(raw, header.pairs[key]),
            getattr(value, "tolist", lambda v=value: v)(),
        )
        assert got == want, key
    carried = {
        key: gguf_writer.encoded_value(gguf.reader_of(raw), value)
        for key, value in header.pairs.items()
    }
    assert gguf_writer.plan(carried, layout) == plan


def test_types_of_values_survive():
    pairs = {kind.name: dtype.type(1) for kind, dtype in DTYPES.items()}
    header = opened(gguf_files.file_of(pairs, {}))
    for kind in DTYPES:
        assert header.pairs[kind.name].type is kind


def test_the_bytes_of_a_small_file():
    raw = gguf_files.file_of(
        {"k": np.uint16(5), "s": "x"}, {"t": ("F32", (2, 1), np.array([1, 2], "<f4").tobytes())}
    )
    head = (
        b"GGUF\x03\0\0\0" + b"\1\0\0\0\0\0\0\0" + b"\2\0\0\0\0\0\0\0"
        b"\1\0\0\0\0\0\0\0k" + b"\2\0\0\0" + b"\5\0"
        b"\1\0\0\0\0\0\0\0s" + b"\x08\0\0\0" + b"\1\0\0\0\0\0\0\0x"
        b"\1\0\0\0\0\0\0\0t" + b"\2\0\0\0" + b"\1\0\0\0\0\0\0\0" + b"\2\0\0\0\0\0\0\0"
        b"\0\0\0\0" + b"\0\0\0\0\0\0\0\0"
    )
    data = b"\0\0\x80?\0\0\0@"
    assert raw == head + bytes(-len(head) % 32) + data + bytes(24)


def test_version_2_is_read():
    assert opened(b"GGUF\2" + VALID[5:]).version == 2


def test_scalars_are_decoded_and_arrays_are_not():
    header = opened(VALID)
    assert header.architecture == "qwen3"
    assert header.get("qwen3.block_count") == 2
    assert header.get("tokenizer.ggml.tokens") is None
    assert header.get("other") is None
    tokens = header.pairs["tokenizer.ggml.tokens"]
    assert (tokens.item, tokens.count) == (ValueType.STRING, 3)
    assert read_array(gguf.reader_of(VALID), tokens) == ["a", "bc", ""]


def test_invalid_utf_8_in_a_value_is_replaced_and_carried_over():
    raw = gguf_hostile.replaced(b"\2\0\0\0\0\0\0\0bc", b"\2\0\0\0\0\0\0\0\xffc")
    tokens = opened(raw).pairs["tokenizer.ggml.tokens"]
    assert read_array(gguf.reader_of(raw), tokens)[1] == "\ufffdc"
    carried = gguf_writer.encoded_value(gguf.reader_of(raw), tokens)
    assert b"\xffc" in gguf_writer.plan({"k": carried}, {}).head


@pytest.mark.parametrize("name", gguf_hostile.CASES)
def test_a_hostile_file_is_refused_with_the_reason(name):
    raw, reason = gguf_hostile.CASES[name]
    tracemalloc.start()
    try:
        with pytest.raises((MalformedGgufError, UnsupportedGgufError)) as refused:
            opened(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason in refused.value.detail
    assert "; " in refused.value.detail
    assert peak < 2 * len(raw) + 100_000


def test_every_cut_is_refused():
    # The last tensor ends before its padding, which may be missing.
    last = opened(VALID).tensors["blk.0.attn_q.weight"].stop
    for size in range(last):
        with pytest.raises(MalformedGgufError):
            opened(VALID[:size])
    opened(VALID[:last])


@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
@settings(max_examples=400)
def test_a_changed_byte_is_read_or_refused(place, byte):
    raw = bytearray(VALID)
    raw[place] = byte
    try:
        header = opened(bytes(raw))
    except BonsaiLoraError:
        return
    assert all(0 <= one.start <= one.stop <= len(raw) for one in header.tensors.values())


def test_a_file_that_became_shorter_is_refused():
    header = opened(VALID)
    with pytest.raises(MalformedGgufError, match="it ends after 100 bytes"):
        gguf.read_header(gguf.reader_of(VALID[:100]), len(VALID))
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores"):
        value = header.pairs[key]
        with pytest.raises(MalformedGgufError):
            read_array(gguf.reader_of(VALID[: value.stop - 1]), value)


def test_a_file_that_became_shorter_while_blocks_are_read_is_refused(rng):
    raw = gguf_files.file_of({}, {"a": ("TQ2_0_G128", (12, 128), g128("TQ2_0_G128", rng))})
    with pytest.raises(MalformedGgufError, match="inside a tensor"):
        gguf.read_header(gguf.reader_of(raw[:200]), len(raw))


def test_a_header_over_the_limit_is_refused():
    raw = gguf_files.file_of({"a": "x" * 10_000, "t": ["y"] * 900, "u": "z"}, {})
    opened(raw, limit=len(raw))
    for limit in (30, 9_000, 11_000, 18_170):
        with pytest.raises(HeaderTooLargeError, match=f"but the limit is {limit}; use a smaller"):
            opened(raw, limit=limit)


def test_a_large_model_opens_fast_and_reads_its_header_only(tmp_path):
    tokens = [f"token{number}" for number in range(151_936)]
    pairs = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [f"{t} x" for t in tokens]}
    layout = {f"blk.{n}.ffn_up.weight": (BY_NAME["Q1_0"], (12_288, 4096)) for n in range(400)}
    plan = gguf_writer.plan(pairs, layout)
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(plan.head)
        file.truncate(plan.total_bytes)
    read = []

    with path.open("rb") as file:

        def read_at(offset, size):
            read.append(size)
            file.seek(offset)
            return file.read(size)

        started = time.perf_counter()
        header = gguf.read_header(read_at, plan.total_bytes)
        seconds = time.perf_counter() - started
    assert dict(header.tensors) == dict(plan.tensors)
    assert sum(read) < len(plan.head) + (3 << 20)
    assert max(read) <= 1 << 20
    assert seconds < 1  # 0.03 s on an idle machine


def g128(name, rng, rows=12):
    return gguf_files.encode(name, gguf_files.ternary(rows * 128, rng))


@pytest.mark.parametrize("name", ["Q2_0", "Q2_0_G128", "TQ2_0_G128"])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("is_padded", [True, False])
def test_the_layouts_of_type_42_are_distinguished(name, alone, is_padded, rng):
    tensors = {
        "a": (name, (3, 4, 128), g128(name, rng)),
        "b": ("F32", (1,), bytes(4)),
        "c": (name, (12, 128), g128(name, rng)),
    }
    if alone:
        tensors = {"c": tensors["c"]}
    pairs = {} if is_padded else {"general.alignment": np.uint32(1)}
    raw = gguf_files.file_of(pairs, tensors)
    if not is_padded:
        raw = aligned_start(raw)
    header = opened(raw)
    kinds = {one.type for one in header.tensors.values()} - {BY_NAME["F32"]}
    assert kinds == {BY_NAME[name]}
    info = header.tensors["c"]
    assert raw[info.start : info.stop] == tensors["c"][2]


def aligned_start(raw):
    """A file that was written with alignment 1, as if there were none but at the start."""
    start = opened(raw).data_start
    head = raw[:start].replace(b"general.alignment", b"general.unaligned")
    return head + bytes(-start % 32) + raw[start:]


def test_tiny_blocks_are_distinguished_by_contents(rng):
    for name in ("Q2_0", "Q2_0_G128", "TQ2_0_G128"):  # 68 and 72 bytes, both padded to 96
        values = gguf_files.ternary(256, rng)
        raw = gguf_files.file_of({}, {"a": (name, (2, 128), gguf_files.encode(name, values))})
        assert opened(raw).tensors["a"].type is BY_NAME[name]


@pytest.mark.parametrize("name", ["Q2_0", "Q2_0_G128", "TQ2_0_G128"])
def test_bytes_after_the_last_tensor_do_not_matter(name, rng):
    tensors = {key: (name, (12, 128), g128(name, rng)) for key in "ab"}
    header = opened(gguf_files.file_of({}, tensors) + bytes(1000))
    assert header.tensors["a"].type is BY_NAME[name]


def test_the_sign_of_oxibonsai_decides(rng):
    raw = g128("Q2_0_G128", rng)
    pairs = {"general.quantization_version": "TQ2_0_G128"}
    header = opened(gguf_files.file_of(pairs, {"a": ("TQ2_0_G128", (12, 128), raw)}))
    assert header.tensors["a"].type is BY_NAME["TQ2_0_G128"]


def test_blocks_of_128_without_a_sign_of_their_layout_are_refused(rng):
    raw = rng.integers(0, 256, 34 * 60).astype(np.uint8).tobytes()
    with pytest.raises(UnsupportedGgufError, match=r"no known layout; valid as Q2_0_G128 \d+%"):
        opened(gguf_files.file_of({}, {"a": ("Q2_0_G128", (60, 128), raw)}))


def test_blocks_of_zeros_have_their_scale_first():
    header = opened(gguf_files.file_of({}, {"a": ("TQ2_0_G128", (60, 128), bytes(2040))}))
    assert header.tensors["a"].type is BY_NAME["Q2_0_G128"]


@pytest.mark.parametrize(
    ("name", "kind", "shape", "reason"),
    [
        ("n" * 64, "F32", (1,), "has 64 bytes, but GGUF allows 63; use safetensors"),
        ("a", "F32", (1,) * 5, "of shape .1, 1, 1, 1, 1. cannot be F32"),
        ("a", "Q8_0", (32, 8), "cannot be Q8_0, which has blocks of 32 elements; use F16 or F32"),
        ("a", "Q8_0", (), "cannot be Q8_0"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(name, kind, shape, reason):
    with pytest.raises(UnsupportedGgufError, match=reason):
        gguf_writer.plan({}, {name: (BY_NAME[kind], shape)})


def test_values_without_a_type_are_not_written():
    for value in (np.complex64(1), np.zeros((2, 2), np.float32), np.array(["x"])):
        with pytest.raises(TypeError):
            gguf_writer.plan({"k": value}, {})
