"""base + factor * H R, (n, r) and (r, m) -> (n, m), where R may be stored turned, as B is."""

from bonsai_lora.kernels.code import FLOAT, Code, Value, vector, zero
from bonsai_lora.kernels.numbers import Kind, load_wide, size_of, store_narrow, write_copy
from bonsai_lora.kernels.target import Target
from bonsai_lora.kernels.tiles import HEIGHTS, MERGED_HEIGHTS, widest

_MOST_LANES = 16
ARGUMENTS = "pnnnpnnnnnppnpnpn"
"""h, n, h_row, h_step, right, r, right_row, is_turned, m, panel, scratch (`outer_scratch`),
factors, factor_step, base, base_row, out, out_row. R is (r, m), or (m, r) where `is_turned`."""


def outer_scratch(r: int, panel: int) -> int:
    """Return the bytes that `Outer` needs, from the start of a cache line on."""
    return 4 * r * (panel + _MOST_LANES)


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

            heights = HEIGHTS if self.base_kind is None else MERGED_HEIGHTS
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
            write_copy(code, self.target.lanes, source, self.right_kind, target, "f32", length)

    def _turn(self, first: Value, last: Value) -> None:
        """Widen columns of R that lie as rows (m, r), as those of B do."""
        code, lanes = self.code, self.target.lanes
        whole = code.add(first, code.down_to(code.builder.sub(last, first), lanes))
        with code.loop(first, whole, lanes) as j:
            start = code.const(0)
            for side in (8, 4) if lanes >= 8 else (4,):
                end = code.add(start, code.down_to(code.builder.sub(self.r, start), side))
                with code.loop(start, end, side) as k:
                    self._turn_square(j.counter, k.counter, first, side)
                start = end
            with (
                code.loop(start, self.r, 1) as k,
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
