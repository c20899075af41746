"""The products of thin matrices, and casts, as machine code.

Three functions do all the arithmetic of an apply and of a merge, each made for the dtypes that it
is first used with:

- `down`: x A^T, (n, k) and (r, k) -> (n, r), dot products along the rows of both, as they lie;
- `outer`: base + factor * H R, (n, r) and (r, m) -> (n, m), where R may be stored turned, as B is;
- `cast`: between float32 and the 16-bit floats, rounded once to nearest even.

`apply` is the first two in one call. Each number of a result is made by the same operations in the
same order, wherever its row stands in a batch and however the work is cut: a row's outputs do not
depend on its batch, to the bit.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from llvmlite import ir

from app.core.jit import (
    FLOAT,
    HALF,
    I16,
    I32,
    I64,
    NOTHING,
    POINTER,
    Code,
    Compiled,
    Target,
    Type,
    Value,
    host,
    vector,
    zero,
)

Kind = Literal["f32", "f16", "bf16"]
Call = Callable[..., float]

DEPTH = 1024
"""Numbers of a row that `down` takes at a time, so that both sides stay in the cache."""
MANY_ROWS = 24
"""From so many on, A is copied to where it lies well (and once, not for each tile, widened)."""
MANY_RANKS = 16
"""From so many on, rows of x are."""
COPIED_ROW = 4 * DEPTH + 64
"""Bytes: not a power of two, so that rows do not meet in the same sets of the cache."""
_ROWS = (6, 4, 2, 1)
"""Of a tile of sums: 6 rows take 4 vectors (2 where registers are few), 1 row takes 8."""
_MERGED_ROWS = (4, 2, 1)
"""Where a base is read and written too: fewer rows that lie apart."""
_MOST_VECTORS = 8

_DOWN = "pnnpnnnpnp"
_OUTER = "pnnnpnnnnnppnpnpn"
_APPLY = "ppnnpnpp"
_ARGUMENTS: dict[str, tuple[Type, type]] = {
    "p": (POINTER, ctypes.c_void_p),
    "n": (I64, ctypes.c_int64),
}


class Products(NamedTuple):
    """The functions of an apply, for A and B of one kind. Pointers and strides are in bytes."""

    down: Call
    """(x, n, x_row, a, r, a_row, k, out, out_row, scratch);"""
    outer: Call
    """(h, n, h_row, h_step, right, r, right_row, is_turned, m, panel, scratch, factors,
    factor_step, base, base_row, out, out_row); this one has no base. R is (r, m), or (m, r) where
    `is_turned`; `scratch` is what `outer_scratch` says; row i has its factor at
    factors + i * factor_step."""
    apply: Call
    """(operands, x, n, x_row, factors, factor_step, scratch, out), where `operands` are eight i64:
    a, r, a_row, d_in, b, b_row, d_out, panel; `scratch` is what `apply_scratch` says. Returns 0, or
    NaN where x A^T is not finite."""


def outer_scratch(r: int, panel: int) -> int:
    """Return the bytes that `outer` needs; they should begin with a cache line, as others."""
    return 4 * r * (panel + 16)


def apply_scratch(n: int, r: int, panel: int) -> int:
    """Return the bytes that `apply` needs."""
    copied = COPIED_ROW * (r + _ROWS[0]) if n >= MANY_ROWS else 0
    return (4 * n * r + 60) // 64 * 64 + max(copied, outer_scratch(r, panel))


class Kernels:
    """The functions for a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.products = lru_cache(self._products)
        self.merge = lru_cache(self._merge)
        self.cast = lru_cache(self._cast)

    def _products(self, kind: Kind) -> Products:
        """Return the functions of an apply."""
        module = ir.Module()
        down = _start(module, "down", _DOWN)
        Down(self.target, kind).write(down)
        outer = _start(module, "outer", _OUTER)
        Outer(self.target, kind, None).write(outer)
        apply = _start(module, "apply", _APPLY, FLOAT)
        write_apply(apply, self.target)
        return Products(*self._compile(module, {"down": _DOWN, "outer": _OUTER, "apply": _APPLY}))

    def _merge(self, right_kind: Kind, base_kind: Kind) -> Call:
        """Return `outer` with a base; `out` has its kind."""
        module = ir.Module()
        Outer(self.target, right_kind, base_kind).write(_start(module, "outer", _OUTER))
        return self._compile(module, {"outer": _OUTER})[0]

    def _cast(self, from_kind: Kind, to_kind: Kind) -> Call:
        """Return cast(array, out, n)."""
        module = ir.Module()
        write_cast(_start(module, "cast", "ppn"), self.target, from_kind, to_kind)
        return self._compile(module, {"cast": "ppn"})[0]

    def _compile(self, module: ir.Module, functions: dict[str, str]) -> list[Call]:
        compiled = Compiled(str(module), self.target)
        made: list[Call] = []
        for name, arguments in functions.items():
            result = ctypes.c_float if name == "apply" else None
            prototype = ctypes.CFUNCTYPE(result, *(_ARGUMENTS[one][1] for one in arguments))
            function = prototype(compiled.address(name))
            function.compiled = compiled  # type: ignore[attr-defined]  # lives as long as it
            made.append(function)
        return made


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """Return the functions for this machine."""
    return Kernels(host())


def _start(module: ir.Module, name: str, arguments: str, result: Type = NOTHING) -> Code:
    return Code(module, name, [_ARGUMENTS[one][0] for one in arguments], result)


def write_apply(code: Code, target: Target) -> None:
    """Write factor * (x A^T) B^T, and a sum that shows whether x A^T is finite."""
    operands, x, n, x_row, factors, step, scratch, out = code.arguments
    a, r, a_row, d_in, b, b_row, d_out, panel = (
        code.load(code.at(operands, code.const(8 * place)), POINTER if place in (0, 4) else I64)
        for place in range(8)
    )
    none, one = code.const(0), code.const(1)
    hidden, hidden_row = scratch, code.times(r, 4)
    count = code.times(n, r)
    bytes_of_hidden = code.builder.and_(
        code.times(code.add(count, code.const(15)), 4), code.const(-64)
    )
    rest = code.at(scratch, bytes_of_hidden)
    code.call("down", [x, n, x_row, a, r, a_row, d_in, hidden, hidden_row, rest])
    left = [hidden, n, hidden_row, code.const(4)]
    right = [b, r, b_row, one, d_out, panel, rest, factors, step]
    base = [ir.Constant(POINTER, None), none]
    code.call("outer", [*left, *right, *base, out, code.times(d_out, 4)])
    # What is not finite stays so when it is multiplied by zero: it becomes NaN.
    check = ir.Constant(FLOAT, 0.0)
    wide = code.down_to(count, target.lanes)
    for start, stop, lanes in ((none, wide, target.lanes), (wide, count, 1)):
        with code.loop(start, stop, lanes, [zero(lanes)]) as loop:
            place = code.at(hidden, code.times(loop.counter, 4))
            numbers = code.load(place, vector(FLOAT, lanes))
            loop.values[0] = code.multiply_add(numbers, zero(lanes), loop.values[0])
        sums = add_lanes(code, loop.values, lanes)
        check = code.builder.fadd(check, sums)
    code.end(check)


def write_widening(
    code: Code, lanes: int, source: Value, kind: Kind, target: Value, count: Value
) -> None:
    """Write a copy of numbers that lie together, to float32."""
    whole = code.down_to(count, lanes)
    for start, stop, step in ((code.const(0), whole, lanes), (whole, count, 1)):
        with code.loop(start, stop, step) as loop:
            place = code.at(source, code.times(loop.counter, size_of(kind)))
            value = load_wide(code, place, kind, step)
            code.store(value, code.at(target, code.times(loop.counter, 4)))


def write_cast(code: Code, target: Target, from_kind: Kind, to_kind: Kind) -> None:
    """Write a cast of numbers that lie together."""
    array, out, count = code.arguments
    wide = code.down_to(count, target.lanes)
    for start, stop, step in ((code.const(0), wide, target.lanes), (wide, count, 1)):
        with code.loop(start, stop, step) as loop:
            place = code.at(array, code.times(loop.counter, size_of(from_kind)))
            value = load_wide(code, place, from_kind, step)
            store_narrow(
                code, value, code.at(out, code.times(loop.counter, size_of(to_kind))), to_kind
            )
    code.end()


class Down:
    """Writes x A^T: tiles of sums over a stretch of the rows, then the next stretch.

    A vector that lies across two cache lines takes two loads. So what many tiles go over is copied
    to where it lies well: A where there are many rows, and rows of x where A has many.
    """

    def __init__(self, target: Target, a_kind: Kind) -> None:
        self.target = target
        self.a_kind = a_kind

    def write(self, code: Code) -> None:
        """Write it all."""
        self.code = code
        self.x, n, self.x_row, a, self.r, a_row, k, self.out, self.out_row, scratch = code.arguments
        none, copied_row = code.const(0), code.const(COPIED_ROW)
        with code.loop(none, n, 1) as i, code.loop(none, self.r, 1) as j:
            code.store(zero(1), self._target(i.counter, j.counter))
        is_many = code.builder.icmp_signed(">=", n, code.const(MANY_ROWS))
        many = code.builder.select(is_many, code.down_to(n, _ROWS[0]), none)
        with code.loop(none, k, DEPTH) as stretch:
            first = stretch.counter
            length = code.least(code.builder.sub(k, first), code.const(DEPTH))
            x = code.at(self.x, code.times(first, 4))
            a_here = code.at(a, code.times(first, size_of(self.a_kind)))
            copied_x = code.at(scratch, code.times(self.r, copied_row))
            with code.builder.if_then(is_many):
                with code.loop(none, self.r, 1) as j:
                    source = code.at(a_here, code.times(j.counter, a_row))
                    target = code.at(scratch, code.times(j.counter, copied_row))
                    self._copy(source, self.a_kind, target, length)
            with code.loop(none, many, _ROWS[0]) as i:
                rows = self._well_lying(x, i.counter, length, copied_x)
                self._rows(i.counter, _ROWS[0], x, rows, (scratch, copied_row, "f32"), length)

            def tiles(i: Value, height: int) -> None:
                rows = code.at(x, code.times(i, self.x_row)), self.x_row
                self._rows(i, height, x, rows, (a_here, a_row, self.a_kind), length)

            code.in_tiles(many, n, _ROWS, tiles)
        self._rest(n, code.down_to(k, self.target.lanes), k, a, a_row)
        code.end()

    def _rest(self, n: Value, first: Value, last: Value, a: Value, a_row: Value) -> None:
        """Add what the last numbers of the rows give, less than a vector."""
        code, none = self.code, self.code.const(0)
        with code.loop(none, n, 1) as i, code.loop(none, self.r, 1) as j:
            x_row = code.at(self.x, code.times(i.counter, self.x_row))
            right = code.at(a, code.times(j.counter, a_row))
            target = self._target(i.counter, j.counter)
            with code.loop(first, last, 1, [code.load(target, FLOAT)]) as k:
                x = code.load(code.at(x_row, code.times(k.counter, 4)), FLOAT)
                place = code.at(right, code.times(k.counter, size_of(self.a_kind)))
                k.values[0] = code.multiply_add(
                    x, load_wide(code, place, self.a_kind, 1), k.values[0]
                )
            code.store(k.values[0], target)

    def _well_lying(self, x: Value, i: Value, length: Value, copied: Value) -> tuple[Value, Value]:
        """Return where the rows i and next are, and their stride: copied where that pays."""
        code, builder = self.code, self.code.builder
        place = code.at(x, code.times(i, self.x_row))
        bits = builder.or_(builder.ptrtoint(place, I64), self.x_row)
        lies_across = builder.icmp_signed("!=", builder.and_(bits, code.const(63)), code.const(0))
        is_wide = builder.icmp_signed(">=", self.r, code.const(MANY_RANKS))
        is_copied = builder.and_(lies_across, is_wide)
        stride = code.const(COPIED_ROW)
        with builder.if_then(is_copied):
            for line, source in enumerate(code.rows(place, code.const(0), self.x_row, _ROWS[0])):
                target = code.at(copied, code.const(line * COPIED_ROW))
                self._copy(source, "f32", target, length)
        return (
            builder.select(is_copied, copied, place),
            builder.select(is_copied, stride, self.x_row),
        )

    def _copy(self, source: Value, kind: Kind, target: Value, length: Value) -> None:
        write_widening(self.code, self.target.lanes, source, kind, target, length)

    def _rows(
        self,
        i: Value,
        height: int,
        x: Value,
        rows: tuple[Value, Value],
        a: tuple[Value, Value, Kind],
        length: Value,
    ) -> None:
        """Add to the results of some rows what a stretch gives, for all of A."""
        code = self.code
        widths = sorted({widest(self.target, height), 1}, reverse=True)
        x_rows = code.rows(rows[0], code.const(0), rows[1], height)

        def tile(j: Value, width: int) -> None:
            # Each tile asks for a row of the next rows of x: the CPU cannot guess that far.
            line = code.least(code.builder.sdiv(j, code.const(width)), code.const(height - 1))
            ahead = code.add(i, code.const(height), line)
            next_row = code.at(x, code.times(ahead, self.x_row))
            a_rows = code.rows(a[0], j, a[1], width)
            self._tile(i, j, x_rows, a_rows, a[2], length, next_row)

        code.in_tiles(code.const(0), self.r, widths, tile)

    def _target(self, i: Value, j: Value) -> Value:
        code = self.code
        return code.at(self.out, code.times(i, self.out_row), code.times(j, 4))

    def _tile(
        self,
        i: Value,
        j: Value,
        x_rows: Sequence[Value],
        a_rows: Sequence[Value],
        a_kind: Kind,
        length: Value,
        next_row: Value,
    ) -> None:
        """Add to height x width results what a stretch gives."""
        code, lanes, size = self.code, self.target.lanes, size_of(a_kind)
        height, width = len(x_rows), len(a_rows)
        whole = code.down_to(length, lanes)
        with code.loop(code.const(0), whole, lanes, [zero(lanes)] * (height * width)) as loop:
            x_place, a_place = code.times(loop.counter, 4), code.times(loop.counter, size)
            code.prefetch(code.at(next_row, x_place), to_write=False)
            xs = [code.load(code.at(row, x_place), vector(FLOAT, lanes)) for row in x_rows]
            for column, row in enumerate(a_rows):
                a = load_wide(code, code.at(row, a_place), a_kind, lanes)
                for line, x in enumerate(xs):
                    place = line * width + column
                    loop.values[place] = code.multiply_add(x, a, loop.values[place])
        for line in range(height):
            place = self._target(code.add(i, code.const(line)), j)
            sums = add_lanes(code, loop.values[line * width : (line + 1) * width], lanes)
            known = code.load(place, vector(FLOAT, width))
            code.store(code.builder.fadd(known, sums), place)


class Outer:
    """Writes base + factor * H R, a panel of R's columns after the other, widened to scratch."""

    def __init__(self, target: Target, right_kind: Kind, base_kind: Kind | None) -> None:
        self.target = target
        self.right_kind = right_kind
        self.base_kind = base_kind

    def write(self, code: Code) -> None:
        """Write it all."""
        self.code = code
        (
            self.h,
            n,
            self.h_row,
            self.h_step,
            self.right,
            self.r,
            self.right_row,
            is_turned,
            m,
            panel,
            self.scratch,
            self.factors,
            self.factor_step,
            self.base,
            self.base_row,
            self.out,
            self.out_row,
        ) = code.arguments
        none = code.const(0)
        # A vector more, so that the rows of a wide panel do not meet in the same sets of the cache.
        self.scratch_row = code.times(code.add(panel, code.const(self.target.lanes)), 4)
        with code.loop(none, m, panel) as loop:
            first = loop.counter
            last = code.least(code.add(first, panel), m)
            turned = code.builder.icmp_signed("!=", is_turned, none)
            with code.builder.if_else(turned) as (then, otherwise):
                with then:
                    self._turn(first, last)
                with otherwise:
                    self._copy(first, last)

            heights = _ROWS if self.base_kind is None else _MERGED_ROWS
            code.in_tiles(none, n, heights, lambda i, height: self._rows(i, height, first, last))
        code.end()

    def _rows(self, i: Value, height: int, first: Value, last: Value) -> None:
        """Write some rows of a panel, in tiles as wide as the registers allow."""
        code, lanes, vectors = self.code, self.target.lanes, widest(self.target, height)
        length = code.builder.sub(last, first)
        end = code.add(first, code.down_to(length, vectors * lanes))
        with code.loop(first, end, vectors * lanes) as j:
            self._tile(i, j.counter, first, height, vectors, lanes)
        # The rest row by row: widths of models are multiples of 64.
        with code.loop(code.const(0), code.const(height), 1) as line:
            row = code.add(i, line.counter)
            whole = code.add(first, code.down_to(length, lanes))
            with code.loop(end, whole, lanes) as j:
                self._tile(row, j.counter, first, 1, 1, lanes)
            with code.loop(whole, last, 1) as j:
                self._tile(row, j.counter, first, 1, 1, 1)

    def _copy(self, first: Value, last: Value) -> None:
        """Widen columns of R (r, m)."""
        code, size = self.code, size_of(self.right_kind)
        place = code.at(self.right, code.times(first, size))
        with code.loop(code.const(0), self.r, 1) as k:
            source = code.at(place, code.times(k.counter, self.right_row))
            target = code.at(self.scratch, code.times(k.counter, self.scratch_row))
            length = code.builder.sub(last, first)
            write_widening(code, self.target.lanes, source, self.right_kind, target, length)

    def _turn(self, first: Value, last: Value) -> None:
        """Widen columns of R that lie as rows (m, r), as those of B do."""
        code, lanes = self.code, self.target.lanes
        side = min(8, lanes)
        whole = code.add(first, code.down_to(code.builder.sub(last, first), lanes))
        deep = code.down_to(self.r, side)
        with code.loop(first, whole, lanes) as j:
            with code.loop(code.const(0), deep, side) as k:
                self._turn_square(j.counter, k.counter, first, side)
            with (
                code.loop(deep, self.r, 1) as k,
                code.loop(code.const(0), code.const(lanes), 1) as i,
            ):
                self._turn_one(code.add(j.counter, i.counter), k.counter, first)
        with code.loop(whole, last, 1) as j, code.loop(code.const(0), self.r, 1) as k:
            self._turn_one(j.counter, k.counter, first)

    def _turn_one(self, j: Value, k: Value, first: Value) -> None:
        code = self.code
        value = load_wide(code, self._right_at(j, k), self.right_kind, 1)
        code.store(value, self._scratch_at(j, k, first))

    def _turn_square(self, j: Value, k: Value, first: Value, side: int) -> None:
        """Turn `lanes` rows of `side` numbers to `side` vectors, by exchanging ever larger squares.

        A vector starts as the rows t, t + side, ... side by side.
        """
        code, lanes = self.code, self.target.lanes
        vectors = []
        rows = code.rows(self._right_at(code.const(0), k), j, self.right_row, lanes)
        for t in range(side):
            parts = [load_wide(code, row, self.right_kind, side) for row in rows[t::side]]
            while len(parts) > 1:
                both = range(2 * parts[0].type.count)
                parts = [
                    code.shuffle(one, other, both)
                    for one, other in zip(parts[::2], parts[1::2], strict=True)
                ]
            vectors.append(parts[0])
        step = 1
        while step < side:
            for t in range(side):
                if t & step:
                    continue
                one, other = vectors[t], vectors[t + step]
                kept = [i if not i & step else lanes + i - step for i in range(lanes)]
                given = [i + step if not i & step else lanes + i for i in range(lanes)]
                vectors[t] = code.shuffle(one, other, kept)
                vectors[t + step] = code.shuffle(one, other, given)
            step *= 2
        for t, value in enumerate(vectors):
            code.store(value, self._scratch_at(j, code.add(k, code.const(t)), first))

    def _right_at(self, j: Value, k: Value) -> Value:
        code = self.code
        return code.at(
            self.right,
            code.times(j, self.right_row),
            code.times(k, size_of(self.right_kind)),
        )

    def _scratch_at(self, j: Value, k: Value, first: Value) -> Value:
        code = self.code
        offset = code.times(code.builder.sub(j, first), 4)
        return code.at(self.scratch, code.times(k, self.scratch_row), offset)

    def _tile(
        self, i: Value, j: Value, first: Value, height: int, vectors: int, lanes: int
    ) -> None:
        """Write height rows of so many vectors."""
        code = self.code
        h_rows = code.rows(self.h, i, self.h_row, height)
        if self.base_kind is not None and lanes > 1:
            self._prefetch(code.add(i, code.const(height)), j, height, vectors * lanes)
        column = self._scratch_at(j, code.const(0), first)
        with code.loop(code.const(0), self.r, 1, [zero(lanes)] * (height * vectors)) as loop:
            k = loop.counter
            source = code.at(column, code.times(k, self.scratch_row))
            rights = [
                code.load(code.at(source, code.const(4 * lanes * one)), vector(FLOAT, lanes))
                for one in range(vectors)
            ]
            offset = code.times(k, self.h_step)
            for line, row in enumerate(h_rows):
                h = code.spread(code.load(code.at(row, offset), FLOAT), lanes)
                for one, right in enumerate(rights):
                    place = line * vectors + one
                    loop.values[place] = code.multiply_add(h, right, loop.values[place])
        kind: Kind = self.base_kind or "f32"
        for line in range(height):
            row = code.add(i, code.const(line))
            factor = code.load(code.at(self.factors, code.times(row, self.factor_step)), FLOAT)
            factor = code.spread(factor, lanes)
            for one in range(vectors):
                value = code.builder.fmul(loop.values[line * vectors + one], factor)
                column = code.times(code.add(j, code.const(one * lanes)), size_of(kind))
                if self.base_kind is not None:
                    place = code.at(self.base, code.times(row, self.base_row), column)
                    value = code.builder.fadd(load_wide(code, place, kind, lanes), value)
                place = code.at(self.out, code.times(row, self.out_row), column)
                store_narrow(code, value, place, kind)

    def _prefetch(self, i: Value, j: Value, height: int, columns: int) -> None:
        """Ask for the same columns of the next rows: they are too far for the CPU to guess."""
        code, size = self.code, size_of(self.base_kind or "f32")
        for one in range(height):
            row = code.add(i, code.const(one))
            for offset in range(0, columns * size, 64):
                column = code.add(code.times(j, size), code.const(offset))
                for pointer, stride, to_write in (
                    (self.base, self.base_row, False),
                    (self.out, self.out_row, True),
                ):
                    place = code.at(pointer, code.times(row, stride), column)
                    code.prefetch(place, to_write=to_write)


def widest(target: Target, height: int) -> int:
    """Return how many sums of each of so many rows the registers hold: a power of two."""
    width = _MOST_VECTORS
    while width > 1 and width * height > target.sums:
        width //= 2
    return width


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
