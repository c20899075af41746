"""x A^T, (n, k) and (r, k) -> (n, r): dot products along the rows of both, as they lie."""

from collections.abc import Sequence

from bonsai_lora.kernels.code import FLOAT, I64, Code, Value, vector, zero
from bonsai_lora.kernels.numbers import Kind, add_lanes, load_wide, size_of, write_copy
from bonsai_lora.kernels.target import Target
from bonsai_lora.kernels.tiles import HEIGHTS, widest

DEPTH = 1024
"""Numbers of a row that are taken at a time, so that both sides stay in the cache."""
MANY_ROWS = 24
"""From so many on, A is copied to where it lies well (and once, not for each tile, widened)."""
MANY_RANKS = 16
"""From so many on, rows of x are."""
COPIED_ROW = 4 * DEPTH + 64
"""Bytes: not a power of two, so that rows do not meet in the same sets of the cache."""
ARGUMENTS = "pnnpnnnpnp"
"""x, n, x_row, a, r, a_row, k, out, out_row, scratch (`down_scratch`)."""


def down_scratch(n: int, r: int) -> int:
    """Return the bytes that `Down` needs, from the start of a cache line on."""
    return COPIED_ROW * (r + HEIGHTS[0]) if n >= MANY_ROWS else 0


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
        many = code.builder.select(is_many, code.down_to(n, HEIGHTS[0]), none)
        with code.loop(none, k, DEPTH) as stretch:
            first = stretch.counter
            length = code.least(code.builder.sub(k, first), code.const(DEPTH))
            x = code.at(self.x, code.times(first, 4))
            a_here = code.at(a, code.times(first, size_of(self.a_kind)))
            copied_x = code.at(scratch, code.times(self.r, copied_row))
            with code.builder.if_then(is_many), code.loop(none, self.r, 1) as j:
                source = code.at(a_here, code.times(j.counter, a_row))
                target = code.at(scratch, code.times(j.counter, copied_row))
                self._copy(source, self.a_kind, target, length)
            with code.loop(none, many, HEIGHTS[0]) as i:
                rows = self._well_lying(x, i.counter, length, copied_x)
                self._rows(i.counter, HEIGHTS[0], x, rows, (scratch, copied_row, "f32"), length)

            def tiles(i: Value, height: int) -> None:
                rows = code.at(x, code.times(i, self.x_row)), self.x_row
                self._rows(i, height, x, rows, (a_here, a_row, self.a_kind), length)

            code.in_tiles(many, n, HEIGHTS, tiles)
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
            for line, source in enumerate(code.rows(place, code.const(0), self.x_row, HEIGHTS[0])):
                target = code.at(copied, code.const(line * COPIED_ROW))
                self._copy(source, "f32", target, length)
        return (
            builder.select(is_copied, copied, place),
            builder.select(is_copied, stride, self.x_row),
        )

    def _copy(self, source: Value, kind: Kind, target: Value, length: Value) -> None:
        write_copy(self.code, self.target.lanes, source, kind, target, "f32", length)

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
