"""Numbers in memory: float32, float16 and bfloat16, read as float32 and rounded once."""

from collections.abc import Sequence
from typing import Literal

from llvmlite import ir

from bonsai_lora.kernels.code import FLOAT, HALF, I16, I32, Code, Value, vector
from bonsai_lora.kernels.target import Target

Kind = Literal["f32", "f16", "bf16"]


def size_of(kind: Kind) -> int:
    """Return the bytes of a number."""
    return 4 if kind == "f32" else 2


def load_wide(code: Code, place: Value, kind: Kind, lanes: int) -> Value:
    """Return the numbers there as float32, which is exact."""
    if kind == "f32":
        return code.load(place, vector(FLOAT, lanes))
    if kind == "f16":
        return code.builder.fpext(code.load(place, vector(HALF, lanes)), vector(FLOAT, lanes))
    bits = code.builder.zext(code.load(place, vector(I16, lanes)), vector(I32, lanes))
    high = code.builder.shl(bits, code.spread(ir.Constant(I32, 16), lanes))
    return code.builder.bitcast(high, vector(FLOAT, lanes))


def store_narrow(code: Code, value: Value, place: Value, kind: Kind) -> None:
    """Write float32 numbers there, rounded to nearest even."""
    builder, lanes = code.builder, getattr(value.type, "count", 1)
    if kind == "f32":
        code.store(value, place)
    elif kind == "f16":
        code.store(builder.fptrunc(value, vector(HALF, lanes)), place)
    else:

        def all_lanes(number: int) -> Value:
            return code.spread(ir.Constant(I32, number), lanes)

        bits = builder.bitcast(value, vector(I32, lanes))
        high = builder.lshr(bits, all_lanes(16))
        half = builder.add(builder.and_(high, all_lanes(1)), all_lanes(0x7FFF))
        rounded = builder.lshr(builder.add(bits, half), all_lanes(16))
        sign = builder.and_(high, all_lanes(0x8000))
        nan = builder.or_(sign, all_lanes(0x7FC0))
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), nan, rounded)
        code.store(builder.trunc(rounded, vector(I16, lanes)), place)


def add_lanes(code: Code, vectors: Sequence[Value], lanes: int) -> Value:
    """Return the sums of the lanes of each vector (a power of two of them), in one vector.

    Halves are added to halves until each sum is one lane, always in the same order.
    """
    if lanes == 1:
        return vectors[0]
    width, count = lanes, len(vectors)
    while width > 1:
        half = width // 2
        starts = range(0, lanes, width)
        low = [
            side + start + lane for side in (0, lanes) for start in starts for lane in range(half)
        ]
        pairs = (
            [(vectors[0], vectors[0])]
            if len(vectors) == 1
            else list(zip(vectors[::2], vectors[1::2], strict=True))
        )
        vectors = [
            code.builder.fadd(
                code.shuffle(one, other, low),
                code.shuffle(one, other, [place + half for place in low]),
            )
            for one, other in pairs
        ]
        width = half
    while len(vectors) > 1:
        both = range(2 * vectors[0].type.count)
        vectors = [
            code.shuffle(one, other, both)
            for one, other in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    if count == 1:
        return code.builder.extract_element(vectors[0], ir.Constant(I32, 0))
    return code.shuffle(vectors[0], vectors[0], range(count))


def write_copy(
    code: Code,
    lanes: int,
    source: Value,
    from_kind: Kind,
    target: Value,
    to_kind: Kind,
    count: Value,
) -> None:
    """Write a copy of numbers that lie together, to numbers of another kind."""
    whole = code.down_to(count, lanes)
    for start, stop, step in ((code.const(0), whole, lanes), (whole, count, 1)):
        with code.loop(start, stop, step) as loop:
            place = code.at(source, code.times(loop.counter, size_of(from_kind)))
            value = load_wide(code, place, from_kind, step)
            place = code.at(target, code.times(loop.counter, size_of(to_kind)))
            store_narrow(code, value, place, to_kind)


def write_cast(code: Code, target: Target, from_kind: Kind, to_kind: Kind) -> None:
    """Write a cast of numbers that lie together: array, out, n."""
    array, out, count = code.arguments
    write_copy(code, target.lanes, array, from_kind, out, to_kind, count)
    code.end()
