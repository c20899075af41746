"""GGUF against llama.cpp itself (xllamacpp) and against its Python package, gguf.

gguf 0.19.0 decodes F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K, TQ1_0 and TQ2_0 correctly. It has no decoder for
Q1_0, and cannot open a file with types 42, 142 or 143.
"""

import ctypes
from pathlib import Path

import gguf_files
import gguf_hostile
import numpy as np
import pytest

from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.formats import gguf, gguf_names, gguf_writer
from bonsai_lora.formats.dequantize import dequantize
from bonsai_lora.formats.gguf_types import BY_NAME, TYPES
from bonsai_lora.formats.gguf_values import read_array
from bonsai_lora.formats.quantize import quantize_q8_0

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

LLAMACPP = {
    "Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_K": "q4_K", "Q6_K": "q6_K", "Q1_0": "q1_0", "Q2_0": "q2_0",
    "TQ1_0": "tq1_0", "TQ2_0": "tq2_0",
}  # fmt: skip
QUANTIZED_BY_PACKAGE = ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "TQ1_0", "TQ2_0"]
OUR_LIMITS = {
    "empty",  # read as no file at all
    "data beyond the file",  # refused when the model is loaded
    "too many tensors",
    "too many elements, and none",
    "a key that is not UTF-8",
    "a tensor name that is not UTF-8",
}
"""Files whose headers llama.cpp accepts."""
OUR_REASONS = ("is not UTF-8", "bytes into the data", "its data starts at")
"""Reasons for which it does not refuse a header."""


class InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@pytest.fixture(scope="module")
def llama():
    """The C functions of llama.cpp."""
    module = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(module.__file__).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.gguf_init_from_buffer.argtypes = [ctypes.c_char_p, ctypes.c_size_t, InitParams]
    library.gguf_init_from_buffer.restype = ctypes.c_void_p
    library.gguf_free.argtypes = [ctypes.c_void_p]
    library.gguf_get_tensor_offset.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gguf_get_tensor_offset.restype = ctypes.c_size_t
    library.gguf_get_data_offset.argtypes = [ctypes.c_void_p]
    library.gguf_get_data_offset.restype = ctypes.c_size_t
    return library


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("gguf")


def opened(raw):
    return gguf.read_header(gguf.reader_of(raw), len(raw))


def refusal(raw):
    """Why a file is refused; empty if it is read."""
    try:
        opened(raw)
    except BonsaiLoraError as error:
        return error.detail
    return ""


def quantized_by(llama, name, values):
    """The bytes that llama.cpp's quantizer writes to files."""
    kind = BY_NAME[name]
    raw = np.empty(kind.bytes_of(values.size), np.uint8)
    llama.ggml_quantize_chunk(
        kind.id,
        ctypes.c_void_p(values.ctypes.data),
        ctypes.c_void_p(raw.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(1),
        ctypes.c_int64(values.size),
        None,
    )
    return raw


def assert_same_bits(got, want):
    assert np.array_equal(got.view(np.uint32), want.reshape(-1).view(np.uint32))


@pytest.mark.parametrize("name", LLAMACPP)
def test_values_are_those_of_llamacpp(llama, name):
    kind = BY_NAME[name]
    raw = gguf_files.random_blocks(name, 4000, np.random.default_rng(1))
    want = np.empty(4000 * kind.block, np.float32)
    decode = getattr(llama, f"dequantize_row_{LLAMACPP[name]}")
    decode(raw, ctypes.c_void_p(want.ctypes.data), ctypes.c_int64(want.size))
    assert_same_bits(dequantize(kind, raw), want)


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "TQ1_0", "TQ2_0"])
def test_what_llamacpp_quantizes_is_read_exactly(llama, name):
    values = gguf_files.ternary(1 << 14, np.random.default_rng(2), block=256)
    if name == "Q1_0":
        values = np.where(values < 0, np.float32(-0.5), np.float32(0.5))
    raw = quantized_by(llama, name, values)
    assert raw.tobytes() == gguf_files.encode(name, values)
    assert np.array_equal(dequantize(BY_NAME[name], raw), values)


def test_q8_0_is_written_as_by_llamacpp_and_its_package(llama, package):
    values = np.random.default_rng(3).standard_normal(1 << 16).astype(np.float32)
    values[:640] = np.round(values[:640] * 20) / 2
    values[640:672] = 0
    values[::32][:20] = 127
    got = quantize_q8_0(values)
    assert np.array_equal(got, quantized_by(llama, "Q8_0", values))
    theirs = package.quants.quantize(values, package.GGMLQuantizationType.Q8_0)
    assert np.array_equal(got, theirs)


@pytest.mark.parametrize("name", sorted(gguf_hostile.CASES.keys() - OUR_LIMITS))
def test_llamacpp_refuses_the_hostile_files(llama, name):
    raw = gguf_hostile.CASES[name][0]
    assert not llama.gguf_init_from_buffer(raw, len(raw), InitParams(True, None))


def test_what_llamacpp_refuses_is_refused(llama):
    """Random changes of the header: the package is stricter in three ways, and never more lenient."""
    rng = np.random.default_rng(5)
    valid = gguf_hostile.VALID
    size = opened(valid).data_start
    agreed = 0
    for _ in range(4000):
        raw = bytearray(valid)
        for place in rng.integers(0, size, rng.integers(1, 4)):
            raw[place] = rng.choice([0, 1, 2, 128, 255, rng.integers(256)])
        found = llama.gguf_init_from_buffer(bytes(raw), len(raw), InitParams(True, None))
        reason = refusal(bytes(raw))
        stricter = any(one in reason for one in OUR_REASONS)
        assert bool(found) == (not reason) or stricter, reason
        agreed += bool(found) and not reason
        llama.gguf_free(found)
    assert agreed > 400


@pytest.mark.parametrize("alignment", [32, 64, 1, 4096])
def test_llamacpp_reads_what_we_write(llama, alignment):
    pairs = {**gguf_hostile.PAIRS, "general.alignment": np.uint32(alignment)}
    raw = gguf_files.file_of(pairs, gguf_hostile.TENSORS)
    found = llama.gguf_init_from_buffer(raw, len(raw), InitParams(True, None))
    assert found
    header = opened(raw)
    assert llama.gguf_get_data_offset(found) == header.data_start
    for number, info in enumerate(header.tensors.values()):
        offset = llama.gguf_get_tensor_offset(found, number)
        assert header.data_start + offset == info.start
    llama.gguf_free(found)


@pytest.mark.parametrize("name", QUANTIZED_BY_PACKAGE)
def test_values_are_those_of_the_package(package, name):
    kind = BY_NAME[name]
    raw = gguf_files.random_blocks(name, 2000, np.random.default_rng(4))
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, kind.size)
    theirs = package.quants.dequantize(blocks, package.GGMLQuantizationType(kind.id))
    assert_same_bits(dequantize(kind, raw), theirs)


def test_types_are_those_of_the_package(package):
    theirs = {int(one): size for one, size in package.GGML_QUANT_SIZES.items()}
    ours = {one.id: (one.block, one.size) for one in TYPES.values()}
    # The package counts Q8_1's two float16 as float32.
    assert ours == {**theirs, 9: (32, 36), 42: (64, 18), 142: (128, 34), 143: (128, 28)}
    assert {package.GGMLQuantizationType(one).name for one in theirs} == {
        one.name for one in TYPES.values() if one.id in theirs
    }


def test_the_package_lacks_the_types_of_bonsai(package):
    with pytest.raises(NotImplementedError):
        package.quants.dequantize(np.zeros((1, 18), np.uint8), package.GGMLQuantizationType.Q1_0)
    for number in (42, 142, 143):
        with pytest.raises(ValueError, match=f"{number} is not a valid"):
            package.GGMLQuantizationType(number)


def test_the_package_reads_what_we_write(package, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_hostile.VALID)
    theirs = package.GGUFReader(path)
    assert theirs.get_field("qwen3.block_count").contents() == 2
    assert theirs.get_field("tokenizer.ggml.tokens").contents() == ["a", "bc", ""]
    read = gguf.reader_of(gguf_hostile.VALID)
    ours = gguf.read_header(read, len(gguf_hostile.VALID)).tensors
    assert [one.name for one in theirs.tensors] == [*ours]
    for one in theirs.tensors:
        assert (one.data_offset, one.n_bytes) == (
            ours[one.name].start,
            ours[one.name].stop - ours[one.name].start,
        )


def test_we_read_what_the_package_writes(package, tmp_path):
    path = tmp_path / "model.gguf"
    writer = package.GGUFWriter(path, "qwen3")
    writer.add_block_count(3)
    writer.add_token_list(["a", "é"])
    writer.add_token_scores([0.5, 1.0])
    writer.add_bool("flag", True)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("a", values)
    writer.add_tensor("b", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = path.read_bytes()
    read = gguf.reader_of(raw)
    header = gguf.read_header(read, len(raw))
    assert header.architecture == "qwen3"
    assert header.get("qwen3.block_count") == 3
    assert header.get("flag") is True
    assert read_array(read, header.pairs["tokenizer.ggml.tokens"]) == ["a", "é"]
    for info in header.tensors.values():
        got = dequantize(info.type, raw[info.start : info.stop]).reshape(info.shape)
        assert np.array_equal(got, values)
    carried = {key: gguf_writer.encoded_value(read, value) for key, value in header.pairs.items()}
    layout = {name: (info.type, info.shape) for name, info in header.tensors.items()}
    made = gguf_writer.plan(carried, layout)
    assert made.head == raw[: header.data_start]
    assert dict(made.tensors) == dict(header.tensors)


def test_names_are_those_of_the_package(package):
    architectures = {name: one for one, name in package.MODEL_ARCH_NAMES.items()}
    for architecture in sorted(gguf_names.ARCHITECTURES):
        theirs = package.get_tensor_name_map(architectures[architecture], 4)
        for template in gguf_names._tables(architecture)[0]:
            name = template.replace("{}", "2", 1).replace("{}", "3")
            found = gguf_names.to_gguf(architecture, name)
            # The converter renames dt_bias, and stacks experts, before it looks names up.
            asked = name.replace(".dt_bias", ".dt_proj.bias").replace("experts.3.", "experts.")
            assert theirs.get_name(asked, (".weight", ".bias")) == found.name
