"""The products of an apply and of a merge, on NumPy arrays, by `bonsai_lora.kernels`."""

import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.cast import FLOAT32, Array, Floats, address_of, kind_of, to_float32
from bonsai_lora.core.crew import crew
from bonsai_lora.kernels.apply import hidden_scratch, part_scratch
from bonsai_lora.kernels.library import kernels
from bonsai_lora.kernels.numbers import Kind
from bonsai_lora.kernels.outer import outer_scratch

_APPLY_PANEL_VALUES = 1 << 13
"""Of B, turned before the rows of a batch go over it: as much as stays in the first-level cache."""
_MERGE_PANEL_VALUES = 1 << 16
"""Of A, for merges: in the second-level cache, so that W is gone through in long stretches."""
_LEAST_COLUMNS = 128
_LINE = 64
_LEAST_SCRATCH, _KEPT_SCRATCH = 1 << 16, 1 << 22
_SHARED_OPERATIONS = 1_200_000
"""Multiply-adds from which an apply is shared out, about 30 µs (benchmarks/apply.py)."""
_ROWS_OF_READING = 5
"""Rows that take as long as reading A and B does."""


class Operand(NamedTuple):
    """A matrix whose rows lie in memory as they are multiplied."""

    matrix: Array
    address: int
    row_bytes: int
    """From a row to the next."""
    kind: Kind


def operand(matrix: Array) -> Operand:
    """Return a matrix (float32, float16 or bfloat16) as it lies, or a copy where it must be."""
    kind = kind_of(matrix.dtype)
    if kind is None:  # float16 where the CPU cannot convert it
        matrix, kind = to_float32(matrix), "f32"
    elif matrix.shape[1] > 1 and matrix.strides[1] != matrix.itemsize:
        is_broadcast = matrix.strides[0] == 0  # one row is enough
        lying = np.ascontiguousarray(matrix[:1] if is_broadcast else matrix)
        matrix = np.broadcast_to(lying, matrix.shape)
    return Operand(matrix, address_of(matrix), matrix.strides[0], kind)


class Operands(NamedTuple):
    """A and B of an adapter, as `multiply` takes them."""

    a: Operand
    b: Operand
    panel: int
    """Rows of B, columns of the outputs, that are turned at a time."""
    table: npt.NDArray[np.int64]
    """All that the kernel has to know of them."""
    address: int
    """Of that table."""

    @classmethod
    def of(cls, a_matrix: Array, b_matrix: Array) -> "Operands":
        """Return A (r, d_in) and B (d_out, r), in place where they can be."""
        a, b = operand(a_matrix), operand(b_matrix)
        if a.kind != b.kind:
            a, b = operand(to_float32(a_matrix)), operand(to_float32(b_matrix))
        (rank, d_in), d_out = a_matrix.shape, len(b_matrix)
        panel = _panel(rank, _APPLY_PANEL_VALUES)
        numbers = (a.address, rank, a.row_bytes, d_in, b.address, b.row_bytes, d_out, panel)
        kernels().apply(a.kind)  # made now: who asks for operands waits for it, not who applies
        table = np.array(numbers, np.int64)
        return cls(a, b, panel, table, address_of(table))


def multiply(x: Floats, operands: Operands, factors: Floats) -> tuple[Floats, bool]:
    """Return factor * (x A^T) B^T, (n, d_in) -> (n, d_out), and whether x A^T is finite.

    `factors` is one float32 number (1,) or one per row (n,).
    """
    if x.dtype != FLOAT32 or (x.shape[1] > 1 and x.strides[1] != x.itemsize):
        x = np.ascontiguousarray(x, FLOAT32)
    rows, rank, d_out = len(x), len(operands.a.matrix), len(operands.b.matrix)
    if len(factors) not in (1, rows):
        raise ValueError(f"expected one weight, or one for each of {rows} rows; got {len(factors)}")
    outputs = np.empty((rows, d_out), FLOAT32)
    functions = kernels().apply(operands.a.kind)
    step = part_scratch(rows, rank, operands.panel)
    is_shared = rank * (x.shape[1] + d_out) * (rows + _ROWS_OF_READING) > _SHARED_OPERATIONS
    helpers = crew()
    threads = helpers.threads if is_shared else 1
    scratch, held = _scratch(hidden_scratch(rows, rank) + threads * step)
    job = (
        operands.address,
        address_of(x),
        rows,
        x.strides[0],
        address_of(factors),
        0 if len(factors) == 1 else 4,
        scratch,
        step,
        address_of(outputs),
    )
    check = functions.alone(*job) if threads == 1 else helpers.apply(functions, job)
    del held
    return outputs, check == 0


def add_product(base: Array, left: Floats, right: Array, factor: float, *, out: Array) -> None:
    """Write base + factor * left @ right to `out`, which may be `base`: (n, r) and (r, m).

    `base` and `out` have one dtype that is multiplied here; the sum is float32, rounded once.
    """
    _check_merge(base, left, right, out)
    is_turned = right.shape[1] > 1 and right.strides[1] != right.itemsize
    source = operand(right.T if is_turned else right)
    rows, rank = left.shape
    columns = base.shape[1]
    panel = min(_panel(rank, _MERGE_PANEL_VALUES), max(1, columns))
    base_kind = kind_of(base.dtype)
    assert base_kind is not None
    with np.errstate(over="ignore"):
        factors = np.array([factor], FLOAT32)
    scratch, held = _scratch(outer_scratch(rank, panel))
    kernels().merge(source.kind, base_kind)(
        address_of(left),
        rows,
        left.strides[0],
        left.strides[1],
        source.address,
        rank,
        source.row_bytes,
        int(is_turned),
        columns,
        panel,
        scratch,
        address_of(factors),
        0,
        address_of(base),
        base.strides[0],
        address_of(out),
        out.strides[0],
    )
    del held


def _check_merge(base: Array, left: Floats, right: Array, out: Array) -> None:
    """Raise ValueError for what the kernel cannot see: it is given addresses."""
    shape = (left.shape[0], right.shape[1])
    if not base.shape == out.shape == shape or left.shape[1] != right.shape[0]:
        raise ValueError(
            f"expected shapes (n, m), (n, r), (r, m), (n, m); "
            f"got {base.shape}, {left.shape}, {right.shape}, {out.shape}"
        )
    if base.dtype != out.dtype or left.dtype != FLOAT32:
        raise ValueError(
            f"expected one dtype for base and out and float32 for the left factor; "
            f"got {base.dtype}, {out.dtype}, {left.dtype}"
        )
    for one in (base, out):
        if one.shape[1] > 1 and one.strides[1] != one.itemsize:
            raise ValueError("expected each row of base and out in one piece")
    if not out.flags.writeable:
        raise ValueError("expected an out that may be written")


def _panel(rank: int, values: int) -> int:
    """Return the columns of a panel."""
    fitting = values // max(1, rank)
    return max(_LEAST_COLUMNS, fitting - fitting % _LEAST_COLUMNS)


_local = threading.local()


def _scratch(size: int) -> tuple[int, Array]:
    """Return the address of so many bytes, at the start of a cache line, and what holds them.

    They are this thread's until it asks again. Much is not kept.
    """
    room: Array | None = getattr(_local, "room", None)
    if room is None or len(room) < size + _LINE:
        room = np.empty(max(size, _LEAST_SCRATCH) + _LINE, np.uint8)
        if size <= _KEPT_SCRATCH:
            _local.room = room
    return -(-address_of(room) // _LINE) * _LINE, room
