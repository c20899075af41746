"""GGUF's tensor types against worked examples, llama.cpp's own numbers, and slow decoders."""

import json
import math

import gguf_files
import numpy as np
import pytest
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.errors import MalformedGgufError, UnsupportedGgufError
from bonsai_lora.formats import gguf
from bonsai_lora.formats.dequantize import can_dequantize, dequantize, read_rows
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.quantize import quantize_q8_0

VECTORS = json.loads((DATA / "gguf" / "vectors.json").read_text())
LLAMACPP = json.loads((DATA / "gguf" / "llamacpp.json").read_text())
QUANTIZED = sorted(gguf_files.DECODERS)
FLOATS = ["F32", "F16", "BF16"]


def assert_same_bits(got, want):
    assert got.dtype == want.dtype == np.float32
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("name", VECTORS)
def test_a_worked_example(name):
    case = VECTORS[name]
    kind = BY_NAME[name]
    want = np.full(kind.block, case["else"], np.float32)
    for places, value in case["values"].items():
        want[[int(place) for place in places.split()]] = value
    raw = bytes.fromhex(case["hex"])
    assert len(raw) == kind.size
    assert np.array_equal(dequantize(kind, raw), want)


@pytest.mark.parametrize("name", LLAMACPP["decoded"])
def test_the_numbers_of_llamacpp(name):
    case = LLAMACPP["decoded"][name]
    want = np.frombuffer(bytes.fromhex(case["float32"]), np.float32)
    assert_same_bits(dequantize(BY_NAME[name], bytes.fromhex(case["blocks"])), want)


@pytest.mark.parametrize("name", QUANTIZED)
def test_any_blocks_are_as_a_slow_decoder_reads_them(name):
    raw = gguf_files.random_blocks(name, 40, np.random.default_rng(3))
    assert_same_bits(dequantize(BY_NAME[name], raw), gguf_files.decode(name, raw))


@pytest.mark.parametrize("name", sorted(gguf_files.ENCODERS))
def test_ternary_values_survive(name, rng):
    values = gguf_files.ternary(1024, rng, block=256)
    if name == "Q1_0":
        values = np.where(values < 0, np.float32(-0.5), np.float32(0.5))
    assert np.array_equal(dequantize(BY_NAME[name], gguf_files.encode(name, values)), values)


def test_float_types(rng):
    values = rng.standard_normal(640).astype(np.float32)
    for name in FLOATS:
        raw = gguf_files.encode(name, values)
        got = dequantize(BY_NAME[name], raw)
        assert np.allclose(got, values, rtol={"F32": 0, "F16": 2**-11, "BF16": 2**-8}[name])
        assert gguf_files.encode(name, got) == raw


@pytest.mark.parametrize("name", QUANTIZED + FLOATS)
@given(data=st.data())
@settings(max_examples=10)
def test_any_run_of_blocks_is_that_slice_of_the_whole(name, data):
    kind = BY_NAME[name]
    count = (3 << 16) // kind.block  # more than one piece
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    if name in FLOATS:
        raw = gguf_files.encode(name, rng.standard_normal(count).astype(np.float32))
    else:
        raw = gguf_files.random_blocks(name, count, rng)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole = dequantize(kind, raw)
    part = dequantize(kind, memoryview(raw)[start * kind.size : stop * kind.size])
    assert_same_bits(part, whole[start * kind.block : stop * kind.block])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", QUANTIZED)
def test_scales_that_overflow_or_are_not_numbers_give_no_warning(name, rng):
    raw = bytearray(gguf_files.random_blocks(name, 3, rng))
    for block, bits in enumerate((0x7C00, 0x7E00, 0xFBFF)):
        for at in gguf_files.SCALES.get(name, [0]):
            place = block * BY_NAME[name].size + at
            raw[place : place + 2] = bits.to_bytes(2, "little")
    assert np.array_equal(
        dequantize(BY_NAME[name], bytes(raw)), gguf_files.decode(name, bytes(raw)), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(6, 256), (2, 3, 256), (256,)])
@pytest.mark.parametrize("name", ["Q1_0", "TQ1_0", "F16"])
def test_rows_of_a_tensor(name, shape, rng):
    values = gguf_files.ternary(math.prod(shape), rng, block=256)
    if name == "Q1_0":
        values = np.where(values < 0, np.float32(-0.5), np.float32(0.5))
    raw = gguf_files.file_of(
        {}, {"other": ("F32", (3,), bytes(12)), "t": (name, shape, gguf_files.encode(name, values))}
    )
    read = gguf.reader_of(raw)
    info = gguf.read_header(read, len(raw)).tensors["t"]
    rows = values.reshape(-1, 256)
    for start, stop in ((0, len(rows)), (0, 1), (len(rows) - 1, len(rows)), (1, 1)):
        got = read_rows(read, info, start, stop)
        assert got.shape == (stop - start, 256)
        assert np.array_equal(got, rows[start:stop])
    with pytest.raises(MalformedGgufError, match="inside a tensor"):
        read_rows(gguf.reader_of(raw[: info.stop - 1]), info, 0, len(rows))


def test_a_type_without_a_decoder_is_refused():
    assert not can_dequantize(BY_NAME["IQ2_XS"])
    assert can_dequantize(BY_NAME["Q1_0"])
    with pytest.raises(
        UnsupportedGgufError, match="type IQ2_XS cannot be dequantized; use one of F32"
    ):
        dequantize(BY_NAME["IQ2_XS"], bytes(74))


def test_a_part_of_a_block_is_refused():
    with pytest.raises(ValueError, match="reshape"):
        dequantize(BY_NAME["Q1_0"], bytes(17))


def test_q8_0_is_quantized_as_by_llamacpp():
    case = LLAMACPP["quantized"]["Q8_0"]
    values = np.frombuffer(bytes.fromhex(case["float32"]), np.float32)
    assert quantize_q8_0(values).tobytes().hex() == case["blocks"]


@given(st.integers(0, 2**32 - 1), st.integers(0, 3000))
@settings(max_examples=20)
def test_q8_0_is_off_by_half_a_step_at_most(seed, blocks):
    values = np.random.default_rng(seed).standard_normal(32 * blocks).astype(np.float32)
    raw = quantize_q8_0(values)
    assert len(raw) == 34 * blocks
    step = np.abs(values.reshape(-1, 32)).max(axis=1, initial=0) / 127
    error = np.abs(dequantize(BY_NAME["Q8_0"], raw) - values).reshape(-1, 32)
    assert (
        error <= step[:, None] * 0.57
    ).all()  # the scale is rounded to float16: 127 * 2^-11 more


def test_q8_0_rounds_every_code_half_away_from_zero():
    codes = np.arange(-127, 127, dtype=np.float32)
    for offset, rounded in ((0.5, np.where(codes < 0, codes, codes + 1)), (0.49999, codes)):
        inside = np.where(codes == -127, np.float32(0), codes + np.float32(offset))
        rows = np.zeros((len(codes), 32), np.float32)
        rows[:, 0] = 127  # the scale is 1
        rows[:, 1] = inside
        got = quantize_q8_0(rows.reshape(-1)).reshape(-1, 34)[:, 3].view(np.int8)
        assert got[1:].tolist() == rounded[1:].tolist()


@pytest.mark.filterwarnings("error")
def test_q8_0_of_values_that_are_not_finite():
    values = np.zeros(96, np.float32)
    values[[0, 33, 64]] = np.inf, np.nan, 1e30
    got = dequantize(BY_NAME["Q8_0"], quantize_q8_0(values))
    assert not np.isfinite(got).any()
