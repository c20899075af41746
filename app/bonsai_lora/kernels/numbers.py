"""float32, float16 and bfloat16 numbers in memory: loaded as float32, rounded when stored."""

from typing import Literal

from llvmlite import ir

from bonsai_lora.kernels.code import FLOAT, HALF, I16, I32, Code, Value, vector
from bonsai_lora.kernels.target import Target

Kind = Literal["f32", "f16", "bf16"]

ARGUMENTS = "ppn"
"""Of a cast: array, out, n."""


def size_of(kind: Kind) -> int:
    """Return the bytes of a number."""
    return 4 if kind == "f32" else 2


def load_float32(code: Code, place: Value, kind: Kind, lanes: int) -> Value:
    """Return the numbers at an address as float32, which is exact."""
    if kind == "f32":
        return code.load(place, vector(FLOAT, lanes))
    if kind == "f16":
        return code.builder.fpext(code.load(place, vector(HALF, lanes)), vector(FLOAT, lanes))
    bits = code.builder.zext(code.load(place, vector(I16, lanes)), vector(I32, lanes))
    high = code.builder.shl(bits, code.broadcast(ir.Constant(I32, 16), lanes))
    return code.builder.bitcast(high, vector(FLOAT, lanes))


def store_rounded(code: Code, value: Value, place: Value, kind: Kind) -> None:
    """Store float32 numbers, rounded to nearest even; every NaN as the same NaN."""
    builder, lanes = code.builder, getattr(value.type, "count", 1)
    nan = code.broadcast(ir.Constant(FLOAT, float("nan")), lanes)
    value = builder.select(builder.fcmp_unordered("uno", value, value), nan, value)
    if kind == "f32":
        code.store(value, place)
    elif kind == "f16":
        code.store(builder.fptrunc(value, vector(HALF, lanes)), place)
    else:
        # The upper half, after adding half a unit, minus 1 if the unit is even.
        one, half, shift = (
            code.broadcast(ir.Constant(I32, number), lanes) for number in (1, 0x7FFF, 16)
        )
        bits = builder.bitcast(value, vector(I32, lanes))
        half = builder.add(builder.and_(builder.lshr(bits, shift), one), half)
        rounded = builder.lshr(builder.add(bits, half), shift)
        code.store(builder.trunc(rounded, vector(I16, lanes)), place)


def sum_lanes(code: Code, value: Value) -> Value:
    """Return the sum of a vector's lanes: halves added to halves, and the last two."""
    lanes = value.type.count
    while lanes > 2:
        lanes //= 2
        lower = code.shuffle(value, value, range(lanes))
        upper = code.shuffle(value, value, range(lanes, 2 * lanes))
        value = code.builder.fadd(lower, upper)
    one, other = (code.builder.extract_element(value, ir.Constant(I32, lane)) for lane in (0, 1))
    return code.builder.fadd(one, other)


def convert(
    code: Code,
    lanes: int,
    source: tuple[Value, Kind],
    target: tuple[Value, Kind],
    count: Value,
) -> None:
    """Write a loop that converts contiguous numbers: from an address and kind to another."""
    (source_place, from_kind), (target_place, to_kind) = source, target
    whole = code.round_down(count, lanes)
    for start, stop, step in ((code.const(0), whole, lanes), (whole, count, 1)):
        with code.loop(start, stop, step) as loop:
            place = code.at(source_place, code.times(loop.counter, size_of(from_kind)))
            value = load_float32(code, place, from_kind, step)
            place = code.at(target_place, code.times(loop.counter, size_of(to_kind)))
            store_rounded(code, value, place, to_kind)


def write_cast(code: Code, target: Target, from_kind: Kind, to_kind: Kind) -> None:
    """Write the function that casts contiguous numbers."""
    array, out, count = code.arguments
    convert(code, target.lanes, (array, from_kind), (out, to_kind), count)
    code.builder.ret_void()
