"""Folded weights against the formulas with dense float64 matrices."""

import gguf_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats import gguf
from bonsai_lora.formats.hadamard import PREFIX, Folding, read_folding

WIDTHS = (256, 384)
BLOCK = 128


def matrix(order):
    """The normalized Sylvester-Hadamard matrix, by its definition."""
    one = np.arange(order)
    parity = np.array([[int(i & j).bit_count() & 1 for j in one] for i in one])
    return (1 - 2 * parity) / np.sqrt(order)


def dense(width, block):
    return np.kron(np.eye(width // block), matrix(block))


def signs_of(widths, seed=0):
    rng = np.random.default_rng(seed)
    return {width: rng.choice([-1, 1], width).astype(np.float32) for width in widths}


@pytest.mark.parametrize("block", [1, 2, 16, 32, 64, 1024])
def test_unfolding_is_the_formula_rounded_once(block, rng):
    width = 2 * block
    folding = Folding(block, signs_of([width]))
    stored = rng.standard_normal((5, width)).astype(np.float32)
    want = (stored.astype(np.float64) @ dense(width, block)) * folding.signs[width]
    assert np.allclose(folding.unfold(stored), want, rtol=1e-7, atol=1e-12)


def test_ternary_weights_unfold_exactly(rng):
    """Sums of ternary values are exact in float64, so only one rounding is left."""
    stored = gguf_files.ternary(4 * 1024, rng).reshape(4, 1024)
    want = (stored.astype(np.float64) @ dense(1024, 1024)).astype(np.float32)
    assert np.array_equal(Folding(1024, {}).unfold(stored), want)


def test_a_folded_adapter_acts_like_the_adapter(rng):
    """B A_f (H (s x)) = B A x, with the activations that a runtime folds."""
    width = WIDTHS[1]
    folding = Folding(BLOCK, signs_of(WIDTHS))
    a, x = rng.standard_normal((4, width)), rng.standard_normal(width)
    activations = dense(width, BLOCK) @ (folding.signs[width] * x)
    assert np.allclose(folding.fold(a) @ activations, a @ x, atol=1e-5)


def test_folding_and_unfolding_are_inverse(rng):
    folding = Folding(BLOCK, signs_of(WIDTHS))
    weights = rng.standard_normal((3, 256)).astype(np.float16)
    assert np.allclose(folding.unfold(folding.fold(weights)), weights, atol=1e-6)


@given(st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=20)
def test_any_rows_are_that_slice_of_the_whole(start, stop):
    folding = Folding(BLOCK, signs_of(WIDTHS))
    rows = np.random.default_rng(1).standard_normal((200, 384)).astype(np.float32)
    assert np.array_equal(folding.unfold(rows[start:stop]), folding.unfold(rows)[start:stop])


def pairs(**changes):
    signs = signs_of(WIDTHS)
    known = {
        "version": np.uint32(1),
        "block_size": np.uint32(BLOCK),
        "transform": "normalized-sylvester-walsh-hadamard",
        "axis": "input-last-dimension",
        "sign_mode": "explicit",
        "sign_widths": np.array(WIDTHS, np.int32),
        "sign_values": np.concatenate([*signs.values()]).astype(np.int32),
        "weight_names": ["output.weight", "blk.0.ssm_out.weight"],
        "inverse_weight_names": ["token_embd.weight"],
        "gdn_v_grouped": True,
        **changes,
    }
    return {f"{PREFIX}{key}": value for key, value in known.items() if value is not None}


def folding_of(given_pairs):
    kind = gguf_files.BY_NAME["F32"]
    raw = gguf_files.gguf_writer.encode(
        given_pairs, {"output.weight": (kind, (1, 384), bytes(1536))}
    )
    read = gguf.reader_of(raw)
    return read_folding(gguf.read_header(read, len(raw)), read)


def test_a_folding_is_read_from_the_keys():
    found = folding_of(pairs())
    assert found.block == BLOCK
    assert found.is_grouped
    assert found.weights == {"output.weight", "blk.0.ssm_out.weight", "token_embd.weight"}
    for width, signs in signs_of(WIDTHS).items():
        assert np.array_equal(found.signs[width], signs)


def test_a_file_without_the_keys_is_plain():
    assert folding_of({"general.architecture": "qwen35"}) is None


def test_no_signs_are_needed():
    plain = pairs(
        version=np.uint32(2),
        sign_mode="identity",
        sign_widths=None,
        sign_values=None,
        gdn_v_grouped=None,
        inverse_weight_names=None,
        tied_output=True,
    )
    found = folding_of(plain)
    assert found.signs == {}
    assert not found.is_grouped


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": np.uint32(3)}, "version is '3', not 1 or 2"),
        ({"version": True}, "version is 'True', not 1 or 2"),
        ({"version": None}, "version is 'None', not 1 or 2"),
        ({"transform": "fourier"}, "transform is 'fourier', not normalized-"),
        ({"axis": "output"}, "axis is 'output', not input-last-dimension"),
        ({"sign_mode": "random"}, "sign_mode is 'random', not identity or explicit"),
        ({"sign_mode": None}, "sign_mode is 'None'"),
        ({"block_size": np.uint32(96)}, "block_size is 96, not a power of two"),
        ({"block_size": np.uint32(0)}, "block_size is 0"),
        ({"block_size": np.int32(-4)}, "block_size is -4"),
        ({"block_size": np.uint32(1 << 17)}, "block_size is 131072"),
        ({"block_size": None}, "block_size is None"),
        ({"block_size": True}, "block_size is True"),
        ({"block_size": np.uint32(256)}, "rows of 384 values are not whole blocks of 256"),
        ({"sign_widths": np.array([256], np.int32)}, "do not divide 640 sign_values"),
        ({"sign_widths": np.array([320, 320], np.int32)}, "do not divide 640 sign_values"),
        ({"sign_widths": np.array([896, -256], np.int32)}, "do not divide 640 sign_values"),
        ({"sign_widths": np.array([], np.int32)}, "do not divide 640 sign_values"),
        ({"sign_widths": np.array([640], np.int32)}, "sign_widths has no 384"),
        ({"sign_widths": None}, "sign_widths is not an array of up to 1048576 integers"),
        ({"sign_widths": ["256"]}, "sign_widths is not an array of up to 1048576 integers"),
        (
            {"sign_widths": np.full(2, np.nan)},
            "sign_widths is not an array of up to 1048576 integers",
        ),
        ({"sign_values": np.zeros(640, np.int32)}, "numbers other than 1 and -1"),
        (
            {"sign_values": np.ones(640, np.float32)},
            "sign_values is not an array of up to 1048576 integers",
        ),
        ({"weight_names": "output.weight"}, "weight_names is not an array of up to 65536 strings"),
        ({"weight_names": [""] * 65537}, "weight_names is not an array of up to 65536 strings"),
        (
            {"sign_values": np.ones((1 << 20) + 1, np.int8)},
            "sign_values is not an array of up to 1048576 integers",
        ),
        ({"sign_mode": "identity"}, "sign_mode is 'identity', but there are sign_values"),
        ({"gdn_v_grouped": np.uint8(1)}, "gdn_v_grouped is not a boolean"),
        ({"rotation": np.uint32(1)}, "the key prism.hadamard.rotation is unknown"),
    ],
)
def test_what_cannot_be_unfolded_is_refused(changes, reason):
    with pytest.raises(UnsupportedGgufError) as refused:
        folding_of(pairs(**changes))
    assert reason in refused.value.detail
    assert refused.value.detail.endswith("; use a file with plain weights")


def test_a_width_without_signs_is_refused(rng):
    folding = Folding(BLOCK, signs_of(WIDTHS))
    with pytest.raises(UnsupportedGgufError, match="sign_widths has no 128"):
        folding.unfold(np.zeros((1, 128), np.float32))
    with pytest.raises(UnsupportedGgufError, match="rows of 100 values are not whole blocks"):
        folding.fold(np.zeros((1, 100), np.float32))
