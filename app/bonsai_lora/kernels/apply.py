"""factor * (x A^T) B^T, by one thread or in parts."""

from llvmlite import ir

from bonsai_lora.kernels.code import FLOAT, I64, POINTER, Code, Value, vector, zero
from bonsai_lora.kernels.crew import JOB_WORDS, wait_for
from bonsai_lora.kernels.down import down_scratch
from bonsai_lora.kernels.numbers import add_lanes
from bonsai_lora.kernels.outer import outer_scratch
from bonsai_lora.kernels.target import Target
from bonsai_lora.kernels.tiles import HEIGHTS

ARGUMENTS = "ppnnpnpnp"
"""operands, x, n, x_row, factors, factor_step, scratch, scratch_step, out. `operands` are eight
i64: a, r, a_row, d_in, b, b_row, d_out, panel. Row i has its factor at factors + i * factor_step.
`scratch` holds `hidden_scratch`, and `scratch_step` for each thread."""
PART = ARGUMENTS + "nnp"
"""And part, parts, and a count of the parts that are done with x A^T (bonsai_lora.kernels.crew)."""

assert len(ARGUMENTS) == JOB_WORDS

_RANKS, _ROWS, _COLUMNS = 8, HEIGHTS[0], 64
"""What is not cut through when work is shared out: tiles."""


def hidden_scratch(n: int, r: int) -> int:
    """Return the bytes of x A^T, in whole cache lines."""
    return -(-4 * n * r // 64) * 64


def part_scratch(n: int, r: int, panel: int) -> int:
    """Return the bytes that each thread needs, in whole cache lines."""
    return -(-max(down_scratch(n, r), outer_scratch(r, panel)) // 64) * 64


def write_part(code: Code, target: Target) -> None:
    """Write one of several parts; it returns 0, or NaN where x A^T is not finite.

    First each thread takes some of A's rows or, where those are few, some of x's; when all are done
    with that, each takes some of B's.
    """
    operands, x, n, x_row, factors, step, scratch, scratch_step, out, part, parts, half_done = (
        code.arguments
    )
    a, r, a_row, d_in, b, b_row, d_out, panel = (
        code.load(code.at(operands, code.const(8 * place)), POINTER if place in (0, 4) else I64)
        for place in range(8)
    )
    builder, none, one = code.builder, code.const(0), code.const(1)
    hidden, hidden_row, count = scratch, code.times(r, 4), code.times(n, r)
    lines = builder.and_(code.times(code.add(count, code.const(15)), 4), code.const(-64))
    own = code.at(scratch, lines, code.times(part, scratch_step))

    is_low = builder.icmp_signed("<", r, code.times(parts, 2 * _RANKS))
    is_long = builder.icmp_signed(">=", n, code.times(parts, 2 * _ROWS))
    by_rows = builder.and_(is_low, is_long)
    row, rows = _share(code, n, part, parts, _ROWS)
    rank, ranks = _share(code, r, part, parts, _RANKS)
    row, rows = builder.select(by_rows, row, none), builder.select(by_rows, rows, n)
    rank, ranks = builder.select(by_rows, none, rank), builder.select(by_rows, r, ranks)
    place = code.at(hidden, code.times(row, hidden_row), code.times(rank, 4))
    left = [code.at(x, code.times(row, x_row)), rows, x_row]
    right = [code.at(a, code.times(rank, a_row)), ranks, a_row, d_in]
    code.call("down", [*left, *right, place, hidden_row, own])

    with builder.if_then(builder.icmp_signed(">", parts, one)):
        code.atomic("add", half_done, one)
        wait_for(code, half_done, parts)
    column, columns = _share(code, d_out, part, parts, _COLUMNS)
    left = [hidden, n, hidden_row, code.const(4)]
    right = [code.at(b, code.times(column, b_row)), r, b_row, one]
    panels = [columns, panel, own, factors, step]
    base = [ir.Constant(POINTER, None), none]
    target_place = code.at(out, code.times(column, 4))
    code.call("outer", [*left, *right, *panels, *base, target_place, code.times(d_out, 4)])
    code.end(_not_finite(code, target, hidden, count))


def write_apply(code: Code) -> None:
    """Write the only part."""
    nobody = ir.Constant(POINTER, None)
    code.end(code.call("part", [*code.arguments, code.const(0), code.const(1), nobody]))


def _share(code: Code, whole: Value, part: Value, parts: Value, unit: int) -> tuple[Value, Value]:
    """Return the first and the number of what a part takes of so many, in whole units."""
    builder = code.builder
    next_part = code.add(part, code.const(1))
    first = code.down_to(builder.sdiv(builder.mul(whole, part), parts), unit)
    end = code.down_to(builder.sdiv(builder.mul(whole, next_part), parts), unit)
    is_last = builder.icmp_signed("==", next_part, parts)
    return first, builder.sub(builder.select(is_last, whole, end), first)


def _not_finite(code: Code, target: Target, hidden: Value, count: Value) -> Value:
    """Return 0, or NaN where one of so many numbers is not finite: times zero it becomes NaN."""
    check = ir.Constant(FLOAT, 0.0)
    wide = code.down_to(count, target.lanes)
    starts = ((code.const(0), wide, target.lanes), (wide, count, 1))
    for start, stop, lanes in starts:
        with code.loop(start, stop, lanes, [zero(lanes)]) as loop:
            numbers = code.load(code.at(hidden, code.times(loop.counter, 4)), vector(FLOAT, lanes))
            loop.values[0] = code.multiply_add(numbers, zero(lanes), loop.values[0])
        check = code.builder.fadd(check, add_lanes(code, loop.values, lanes))
    return check
