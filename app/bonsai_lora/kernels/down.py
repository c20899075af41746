"""The down-projection x A^T, (n, k) and (r, k) -> (n, r): dot products of rows, read in place.

out = np.zeros((n, r), np.float32)
for first in range(0, k, DEPTH):
    part = slice(first, first + DEPTH)
    out += x[:, part] @ a[:, part].T
"""

from collections.abc import Sequence

from bonsai_lora.kernels.code import FLOAT, Code, Value, vector, zero
from bonsai_lora.kernels.numbers import Kind, convert, load_float32, size_of, sum_lanes
from bonsai_lora.kernels.outer import HEIGHTS
from bonsai_lora.kernels.target import Target

DEPTH = 1024
"""Numbers of a row that are multiplied at a time, so that both sides stay in the cache."""
MANY_ROWS = 24
"""Minimum rows for which each stretch of A is packed: widened and aligned once for all rows."""
PACKED_ROW = 4 * DEPTH + 64
"""In bytes; not a power of two, so that rows do not share the same cache sets."""
ARGUMENTS = "pnnpnnnpnp"
"""x, n, x_row, a, r, a_row, k, out, out_row, scratch (`scratch_bytes`)."""


def scratch_bytes(n: int, r: int) -> int:
    """Return the scratch bytes of `Down`, aligned to a cache line."""
    return PACKED_ROW * r if n >= MANY_ROWS else 0


class Down:
    """Generates x A^T: tiles of sums over one stretch of the rows after another."""

    def __init__(self, target: Target, a_kind: Kind) -> None:
        self.target = target
        self.a_kind = a_kind

    def write(self, code: Code) -> None:
        """Generate the function."""
        self.code = code
        self.x, n, self.x_row, a, self.r, a_row, k, self.out, self.out_row, scratch = code.arguments
        none, packed_row = code.const(0), code.const(PACKED_ROW)
        with code.loop(none, n, 1) as i, code.loop(none, self.r, 1) as j:
            code.store(zero(1), self._sum_at(i.counter, j.counter))
        is_many = code.builder.icmp_signed(">=", n, code.const(MANY_ROWS))
        many = code.builder.select(is_many, code.round_down(n, HEIGHTS[0]), none)
        with code.loop(none, k, DEPTH) as stretch:
            first = stretch.counter
            length = code.minimum(code.builder.sub(k, first), code.const(DEPTH))
            x = code.at(self.x, code.times(first, 4))
            a_here = code.at(a, code.times(first, size_of(self.a_kind)))
            with code.builder.if_then(is_many), code.loop(none, self.r, 1) as j:
                source = code.at(a_here, code.times(j.counter, a_row))
                target = code.at(scratch, code.times(j.counter, packed_row))
                convert(code, self.target.lanes, (source, self.a_kind), (target, "f32"), length)

            def packed(i: Value, height: int) -> None:
                self._rows(i, height, x, (scratch, packed_row, "f32"), length)

            def in_place(i: Value, height: int) -> None:
                self._rows(i, height, x, (a_here, a_row, self.a_kind), length)

            code.in_tiles(none, many, HEIGHTS[:1], packed)
            code.in_tiles(many, n, HEIGHTS, in_place)
        self._rest(n, code.round_down(k, self.target.lanes), k, a, a_row)
        code.builder.ret_void()

    def _rest(self, n: Value, first: Value, last: Value, a: Value, a_row: Value) -> None:
        """Add the products of the remainder of each row, less than a vector."""
        code, none = self.code, self.code.const(0)
        with code.loop(none, n, 1) as i, code.loop(none, self.r, 1) as j:
            x_row = code.at(self.x, code.times(i.counter, self.x_row))
            right = code.at(a, code.times(j.counter, a_row))
            place = self._sum_at(i.counter, j.counter)
            with code.loop(first, last, 1, [code.load(place, FLOAT)]) as k:
                x = code.load(code.at(x_row, code.times(k.counter, 4)), FLOAT)
                a_place = code.at(right, code.times(k.counter, size_of(self.a_kind)))
                number = load_float32(code, a_place, self.a_kind, 1)
                k.values[0] = code.multiply_add(x, number, k.values[0])
            code.store(k.values[0], place)

    def _rows(
        self,
        i: Value,
        height: int,
        x: Value,
        a: tuple[Value, Value, Kind],
        length: Value,
    ) -> None:
        """Add the products of some rows with all of A, over a stretch."""
        code, (place, stride, kind) = self.code, a
        x_rows = code.rows(x, i, self.x_row, height)
        widths = sorted({self.target.vectors_of(height), 1}, reverse=True)

        def tile(j: Value, width: int) -> None:
            # Each tile prefetches one of the next rows of x: too far ahead for the CPU to predict.
            line = code.minimum(code.builder.sdiv(j, code.const(width)), code.const(height - 1))
            ahead = code.times(code.add(i, code.const(height), line), self.x_row)
            a_rows = code.rows(place, j, stride, width)
            self._tile(i, j, x_rows, a_rows, kind, length, code.at(x, ahead))

        code.in_tiles(code.const(0), self.r, widths, tile)

    def _sum_at(self, i: Value, j: Value) -> Value:
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
        """Add the dot products of each of some rows of x with each of some rows of A."""
        code, lanes, size = self.code, self.target.lanes, size_of(a_kind)
        pairs = [(line, column) for line in range(len(x_rows)) for column in range(len(a_rows))]
        whole = code.round_down(length, lanes)
        with code.loop(code.const(0), whole, lanes, [zero(lanes)] * len(pairs)) as loop:
            x_place, a_place = code.times(loop.counter, 4), code.times(loop.counter, size)
            code.prefetch(code.at(next_row, x_place))
            xs = [code.load(code.at(row, x_place), vector(FLOAT, lanes)) for row in x_rows]
            numbers = [load_float32(code, code.at(row, a_place), a_kind, lanes) for row in a_rows]
            loop.values[:] = [
                code.multiply_add(xs[line], numbers[column], value)
                for (line, column), value in zip(pairs, loop.values, strict=True)
            ]
        for (line, column), value in zip(pairs, loop.values, strict=True):
            place = self._sum_at(code.add(i, code.const(line)), code.add(j, code.const(column)))
            total = code.builder.fadd(code.load(place, FLOAT), sum_lanes(code, value))
            code.store(total, place)
