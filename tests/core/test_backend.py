"""The kernels compute what the definition says: to the bit, or within 1e-6 for an apply."""

import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference

from bonsai_lora.core import backend, definition
from bonsai_lora.core.merge import merge_rows, row_squares

DTYPES = [np.dtype(one) for one in (np.float32, np.float16, ml_dtypes.bfloat16)]
FLOAT32 = DTYPES[0]
SHAPES = [(9, 4100, 16), (5, 33, 1), (16, 100, 4), (3, 9, 12), (130, 259, 64)]
EMPTY = [(5, 7, 0), (0, 8, 4), (3, 0, 4)]


def any_floats(rng, shape, dtype=FLOAT32):
    """Numbers of every kind: subnormal, infinite, NaN with any payload and sign, ties."""
    if dtype.itemsize == 2:
        return rng.integers(0, 1 << 16, shape, np.uint16, endpoint=False).view(dtype)
    floats = rng.integers(0, 1 << 32, shape, np.uint32, endpoint=False).view(np.float32)
    halves = rng.integers(0, 1 << 16, shape, np.uint16, endpoint=False)
    ties = (halves.astype(np.uint32) << 16 | 0x8000).view(np.float32)
    return np.where(rng.integers(0, 2, shape, bool), floats, ties)


def same(one, other):
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", DTYPES[1:], ids=str)
def test_casts_are_equal(kernels, rng, kind):
    if kind == np.float16 and "f16" not in kernels._kinds.values():
        pytest.skip("this CPU does not convert float16")
    every = np.arange(1 << 16, dtype=np.uint16).view(kind)
    odd = any_floats(rng, (1 << 18) + 7)
    for array, dtype in ((every, FLOAT32), (odd, kind), (odd[:0], kind), (every[:1], FLOAT32)):
        got, expected = np.empty(array.shape, dtype), np.empty(array.shape, dtype)
        assert kernels.cast(array, got)
        definition.cast(array, expected)
        assert same(got, expected)


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merges_are_equal(kernels, rng, dtype, base_dtype):
    takes = {np.dtype(one) for one in kernels._kinds}
    for rows, columns, rank in SHAPES + EMPTY:
        for wild in (False, True):
            left = (
                any_floats(rng, (rows, rank))
                if wild
                else rng.standard_normal((rows, rank), np.float32)
            )
            right = rng.standard_normal((rank, columns)).astype(dtype)
            base = any_floats(rng, (rows, columns), base_dtype)
            if not wild:
                base = rng.standard_normal((rows, columns)).astype(base_dtype)
            expected = np.empty_like(base)
            definition.merge(base, left, right, 0.3, expected)
            for one, other in itertools.product(
                (left, np.asfortranarray(left)), (right, np.asfortranarray(right))
            ):
                got = np.empty_like(base)
                is_taken = kernels.merge(base, one, other, 0.3, got)
                assert is_taken == ({dtype, base_dtype} <= takes) or base.size == 0
                assert same(got, expected) or not is_taken


def test_the_factor_may_overflow(kernels):
    base, left, right = (
        np.zeros((2, 3), np.float32),
        np.ones((2, 1), np.float32),
        np.ones((1, 3), np.float32),
    )
    got, expected = np.empty_like(base), np.empty_like(base)
    assert kernels.merge(base, left, right, 1e300, got)
    definition.merge(base, left, right, 1e300, expected)
    assert np.isinf(got).all()
    assert same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(48, 32, 4), (1030, 2100, 17), (2048, 300, 64), (7, 5, 0)], ids=str
)
def test_applies_agree(kernels, rng, shape, dtype):
    d_in, d_out, rank = shape
    a_matrix = rng.standard_normal((rank, d_in)).astype(dtype)
    b_matrix = rng.standard_normal((d_out, rank)).astype(dtype)
    x = rng.standard_normal((33, d_in)).astype(np.float32)
    factors = rng.standard_normal(33).astype(np.float32)
    apply = kernels.make_apply(a_matrix, b_matrix)
    if apply is None:
        assert dtype == np.float16
        return
    got, expected = apply(x, factors), definition.apply(a_matrix, b_matrix, x, factors)
    delta = reference.delta_weight(a_matrix, b_matrix, 1.0)
    most = 1e-6 * np.linalg.norm(x, axis=1) * np.abs(factors) * np.linalg.norm(delta)
    assert (np.linalg.norm(got.astype(np.float64) - expected, axis=1) <= most).all()


def test_what_the_kernels_do_not_take(kernels):
    doubles, floats = np.ones((2, 2)), np.ones((2, 2), np.float32)
    halves = floats.astype(ml_dtypes.bfloat16)
    assert kernels.make_apply(doubles, doubles) is None
    assert kernels.make_apply(floats, halves) is None
    assert not kernels.cast(doubles, np.empty_like(floats))
    assert not kernels.cast(halves.T[::-1], np.empty_like(floats))
    assert not kernels.cast(halves[:1], np.empty_like(floats))
    assert not kernels.merge(doubles, floats, floats, 1.0, doubles)
    for out in (floats[:, :1], np.asfortranarray(floats), np.broadcast_to(np.float32(0), (2, 2))):
        assert not kernels.merge(floats, floats, floats, 1.0, out)
    assert kernels.list_of(doubles) is None


def test_float64_is_merged_in_float64(computing, rng):
    base, left, right = (
        rng.standard_normal((3, 7)),
        *(rng.standard_normal((7, 7), np.float32) for _ in "ab"),
    )
    out = np.empty_like(base)
    merge_rows(base, right[:2], left[:3, :2], 0.3, out=out)
    exact = base + 0.3 * (left[:3, :2].astype(float) @ right[:2].astype(float))
    assert np.abs(out - exact).max() < 1e-14
    cut = np.empty_like(base)
    for row in range(3):
        rows = slice(row, row + 1)
        merge_rows(base[rows], right[:2], left[rows, :2], 0.3, out=cut[rows])
    assert same(out, cut)


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.float64)], ids=str)
def test_dora_merges_do_not_depend_on_the_block(computing, rng, dtype):
    for columns in (1, 129, 3000, 20_011):
        base = rng.standard_normal((7, columns)).astype(dtype)
        left, right = (
            rng.standard_normal((7, 4), np.float32),
            rng.standard_normal((4, columns), np.float32),
        )
        magnitude = rng.uniform(0.5, 2, 7).astype(np.float32)
        whole, cut = np.empty_like(base), np.empty_like(base)
        merge_rows(base, right, left, 0.5, out=whole, magnitude=magnitude)
        for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
            merge_rows(base[rows], right, left[rows], 0.5, out=cut[rows], magnitude=magnitude[rows])
        assert same(whole, cut)
        norms = np.sqrt(row_squares(whole.astype(np.float32)))
        assert norms == pytest.approx(magnitude, rel=1e-2)


@pytest.mark.parametrize(
    ("row", "magnitude", "expected"),
    [
        ([0, 0], 1, [np.nan, np.nan]),  # it has no direction
        ([np.inf, 1], 1, [np.nan, 0]),
        ([3e38, -3e38], 1, [0, 0]),  # its norm is beyond float32
        ([1e-30, 0], 1e30, [np.inf, np.nan]),  # its factor is
    ],
)
def test_dora_rows_that_have_no_norm_are_as_in_torch(computing, row, magnitude, expected):
    rows, out = np.array([row], np.float32), np.empty((1, 2), np.float32)
    left, right = np.zeros((1, 1), np.float32), np.zeros((1, 2), np.float32)
    merge_rows(rows, right, left, 1.0, out=out, magnitude=np.array([magnitude], np.float32))
    np.testing.assert_array_equal(out, [expected])


def run(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_backend_for_a_process():
    off = "from bonsai_lora.core import backend as b; print(b.choose('off')); print(b.choose('auto'), b.running())"
    assert run(off).splitlines() == ["switched off", "switched off None"]
    late = (
        "import numpy as np; from bonsai_lora.core import backend as b; b.list_of(np.ones(3, np.float32))\n"
        "if b.running() is None: print('the kernels are in use already')\n"
        "else:\n"
        "    try: b.choose('off')\n"
        "    except RuntimeError as error: print(error)"
    )
    assert "the kernels are in use already" in run(late)


def test_without_llvmlite_the_definition_computes():
    code = (
        "import sys; sys.modules['llvmlite'] = None\n"
        "import numpy as np; from bonsai_lora import LoraAdapter, LoraConfig\n"
        "from bonsai_lora.core import backend as b\n"
        "one = LoraAdapter.new(16, 8, LoraConfig(rank=4)); assert not one.apply(np.ones(16, np.float32)).any()\n"
        "print(b.choose())"
    )
    assert run(code).endswith("is not installed")


def test_threads_that_need_one_kernel_compile_it_once(monkeypatch):
    library = pytest.importorskip("bonsai_lora.kernels.library")
    from bonsai_lora.kernels.target import host

    made = []
    machine_code = library.machine_code

    def count(*arguments):
        made.append(arguments)
        time.sleep(0.1)
        return machine_code(*arguments)

    monkeypatch.setattr(library, "machine_code", count)
    fresh = library.Library(host())
    with ThreadPoolExecutor(8) as threads:
        functions = list(threads.map(lambda _: fresh.get("cast", "f32", "bf16"), range(8)))
    assert len(made) == 1
    assert all(one is functions[0] for one in functions)


def test_prepare_leaves_nothing_of_an_apply_to_compile(kernels, monkeypatch, rng):
    kernels.prepare()
    library = pytest.importorskip("bonsai_lora.kernels.library")
    monkeypatch.setattr(library, "machine_code", None)
    monkeypatch.setattr(backend, "running", lambda: kernels)
    x = rng.standard_normal((2, 16), np.float32)
    for dtype in DTYPES:
        a_matrix, b_matrix = np.ones((4, 16), dtype), np.ones((8, 4), dtype)
        outputs = backend.make_apply(a_matrix, b_matrix)(x, np.ones(1, np.float32))
        backend.cast(outputs, np.empty(outputs.shape, dtype))
        backend.cast(x.astype(dtype), np.empty_like(x))
        text = bytes(backend.list_of(outputs))
        assert backend.find_lists(text, 1)[0].numbers.tobytes() == outputs.tobytes()


def test_the_example_of_the_page_about_kernels(monkeypatch, rng):
    library = pytest.importorskip("bonsai_lora.kernels.library")
    from bonsai_lora.kernels import arrays, code
    from bonsai_lora.kernels.target import Target, host

    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    example = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names = {**vars(code), "Target": Target}
    exec(example, names)
    kernel = library.Kernel(names["write_double"], "ppn")
    monkeypatch.setitem(library.KERNELS, "double", kernel)
    x, out = rng.standard_normal(100, np.float32), np.zeros(100, np.float32)
    double = library.Library(host()).get("double")
    double(arrays.address_of(x), arrays.address_of(out), 99)
    assert np.array_equal(out[:99], 2 * x[:99])
    assert out[99] == 0
