"""Tensors of GGUF files in the order of a checkpoint, and back."""

import gguf_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.checkpoints.file import BaseFile
from bonsai_lora.checkpoints.gguf_tensor import (
    MAX_ROWS,
    MAX_VECTOR,
    MAX_WIDTH,
    Conversion,
    GgufTensor,
    InGgufOrder,
    Stacked,
    gathered,
)
from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats import gguf_names
from bonsai_lora.formats.dequantize import dequantize
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_names import Change, Heads
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.hadamard import Folding

HEADS = Heads(queries=4, keys=2, linear_keys=2, linear_values=6, linear_key_width=8)
ROWS = {
    Change.NONE: 40, Change.Q_ROWS: 64, Change.K_ROWS: 64, Change.V_ROWS: 48,
    Change.V_COLUMNS: 40, Change.QKV_ROWS: 80,
}  # fmt: skip
WIDTH = 96


@pytest.fixture
def stored(tmp_path):
    """Writes bytes as the only content of a file, and returns the tensor."""

    def make(kind, shape, raw, conversion=Conversion(), **options):  # noqa: B008
        path = tmp_path / "x"
        path.write_bytes(raw)
        info = TensorInfo(BY_NAME[kind], shape, 0, len(raw))
        return GgufTensor(BaseFile("b", "x", path), info, shape, conversion, **options)

    return make


def whole(matrix):
    return matrix[slice(0, matrix.shape[0]), slice(0, matrix.shape[1])]


@pytest.mark.parametrize("change", ROWS)
def test_rows_and_columns_go_to_their_places_and_back(stored, rng, change):
    theirs = rng.standard_normal((ROWS[change], WIDTH)).astype(np.float32)
    rows = gguf_names.row_order(change, HEADS, ROWS[change])
    columns = gguf_names.column_order(change, HEADS, WIDTH)
    ours = theirs if rows is None else theirs[rows]
    ours = np.ascontiguousarray(ours if columns is None else ours[:, columns])
    assert (ours == theirs).all() == (change is Change.NONE)
    conversion = Conversion(change, HEADS)
    read = stored("F32", theirs.shape, ours.tobytes(), conversion)
    back = InGgufOrder(read, conversion, theirs.shape)
    assert np.array_equal(whole(read), theirs)
    assert np.array_equal(whole(back), ours)
    for start in range(0, ROWS[change], 7):
        block = slice(start, min(start + 7, ROWS[change])), slice(0, WIDTH)
        assert np.array_equal(read[block], theirs[block])
        assert np.array_equal(back[block], ours[block])


@pytest.mark.parametrize(
    ("change", "shape", "theirs_shape"),
    [
        (Change.PLUS_ONE, (48,), (48,)),
        (Change.DECAY, (6,), (6,)),
        (Change.Q_ROWS, (64,), (64,)),
        (Change.CONVOLUTION, (80, 4), (80, 1, 4)),
    ],
)
def test_vectors_and_convolutions(stored, rng, change, shape, theirs_shape):
    theirs = rng.uniform(0.5, 2, theirs_shape).astype(np.float32)
    order = gguf_names.row_order(change, HEADS, shape[0])
    ours = (theirs if order is None else theirs[order]).reshape(shape)
    ours = {Change.PLUS_ONE: lambda x: x + 1, Change.DECAY: lambda x: -np.exp(x)}.get(
        change, lambda x: x
    )(ours)
    conversion = Conversion(change, HEADS)
    read = stored("F32", shape, ours.astype(np.float32).tobytes(), conversion, is_matrix=False)
    read = read.as_matrix(1)
    assert read.shape == (1, theirs.size)
    assert np.allclose(whole(read), theirs.reshape(1, -1), atol=1e-6)
    assert np.array_equal(read[slice(0, 1), slice(3, 5)], whole(read)[:, 3:5])
    back = InGgufOrder(read, conversion, theirs_shape)
    assert np.allclose(whole(back), ours.reshape(1, -1), atol=1e-6)


def test_long_rows_are_read_in_parts(stored, rng):
    width = 2 * MAX_WIDTH
    raw = gguf_files.random_blocks("Q1_0", 3 * width // 128, rng)
    matrix = stored("Q1_0", (3, width), raw)
    want = dequantize(BY_NAME["Q1_0"], raw).reshape(3, width)
    for start in (0, MAX_WIDTH):
        block = slice(1, 2), slice(start, start + MAX_WIDTH)
        assert np.array_equal(matrix[block], want[block])


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((3, 2 * MAX_WIDTH), {"folding": Folding(128, {})}, "folded rows of 1048576 values"),
        (
            (1, 2 * MAX_WIDTH),
            {"conversion": Conversion(Change.V_COLUMNS, HEADS)},
            "reordered rows of 1048576 values",
        ),
        (
            (MAX_ROWS + 128, 1),
            {"conversion": Conversion(Change.Q_ROWS, HEADS)},
            "reordered tensors of 1048704 rows",
        ),
        ((MAX_VECTOR + 1,), {"is_matrix": False}, "vectors of 4194305 values"),
        ((6, 8), {"conversion": Conversion(Change.Q_ROWS, Heads(queries=4))}, "not divided by 8"),
        ((6, 8), {"conversion": Conversion(Change.K_ROWS, Heads(keys=0))}, "divided by 0 parts"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is(stored, shape, options, reason):
    """An order of rows is in memory, and a hole in a file makes any number of rows cheap."""
    tensor = stored("F32", shape, b"", **options)
    with pytest.raises(UnsupportedGgufError, match=reason):
        tensor.check()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, MAX_WIDTH), {"folding": Folding(128, {})}),
        ((1, MAX_WIDTH), {"conversion": Conversion(Change.V_COLUMNS, Heads(linear_keys=2, linear_values=4))}),
        ((MAX_ROWS, 1), {"conversion": Conversion(Change.Q_ROWS, HEADS)}),
        ((MAX_VECTOR,), {"is_matrix": False}),
        ((MAX_ROWS + 1, 1), {}),
        ((1, 2 * MAX_WIDTH), {"conversion": Conversion(Change.PLUS_ONE)}),
    ],
)  # fmt: skip
def test_what_has_the_largest_size_or_stays_in_order_is_read(stored, shape, options):
    stored("F32", shape, b"", **options).check()


def test_a_stack_is_one_matrix(rng):
    parts = rng.standard_normal((3, 5, 4)).astype(np.float32)
    stack = Stacked([*parts])
    assert stack.shape == (15, 4)
    for first in range(15):
        for last in range(first + 1, 16):
            block = slice(first, last), slice(1, 3)
            assert np.array_equal(stack[block], parts.reshape(15, 4)[block])


@settings(max_examples=200)
@given(st.lists(st.integers(0, 60), max_size=40))
def test_rows_are_gathered_in_runs(places):
    matrix = np.arange(61 * 2, dtype=np.float32).reshape(61, 2)
    asked = []

    def read(first, last):
        asked.append((first, last))
        return matrix[first:last].copy()

    got = gathered(read, np.array(places, np.intp))
    assert np.array_equal(got, matrix[places])
    assert sum(last - first for first, last in asked) <= max(1, 2 * len(places))
