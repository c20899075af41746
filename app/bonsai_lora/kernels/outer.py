"""Sums of outer products: an apply's second product, and all of a merge.

product = np.zeros((n, m), np.float32)
for k in range(r):
    product += h[:, k, None] * right[k]
out[:] = base + factor * product          # `WriteMerge`
out[:] = factor[:, None] * product        # `WriteUp`, where right is B transposed
"""

from collections.abc import Sequence

from bonsai_lora.kernels.code import FLOAT, Code, Value, vector, zero
from bonsai_lora.kernels.numbers import Kind, convert, load_float32, size_of, store_rounded
from bonsai_lora.kernels.target import Target
from bonsai_lora.kernels.tiles import HEIGHTS, MERGED_HEIGHTS, vectors_of

_MOST_LANES = 16
ARGUMENTS = "pnnnpnnnnppnpn"
"""h, n, h_row, h_step, right, r, right_row, m, panel, scratch (`outer_scratch`), factors,
factor_step, out, out_row. `right` is R (r, m) in a merge, B (m, r) in an apply."""
MERGE_ARGUMENTS = ARGUMENTS + "pn"
"""And base, base_row."""


def outer_scratch(r: int, panel: int) -> int:
    """Return the bytes that a panel needs, from the start of a cache line on."""
    return 4 * r * (panel + _MOST_LANES)


class Outer:
    """Writes sums of outer products, a panel of columns after the other, widened to scratch."""

    heights: Sequence[int]

    def __init__(self, target: Target, right_kind: Kind) -> None:
        self.target = target
        self.right_kind = right_kind

    def write(self, code: Code) -> None:
        """Write the function."""
        self.code = code
        (self.h, n, self.h_row, self.h_step, self.right, self.r, self.right_row, m, panel) = (
            code.arguments[:9]
        )
        self.scratch, self.factors, self.factor_step, self.out, self.out_row = code.arguments[9:14]
        # A vector more, so that the rows of a wide panel do not fall into the same cache sets.
        self.scratch_row = code.times(code.add(panel, code.const(self.target.lanes)), 4)
        with code.loop(code.const(0), m, panel) as loop:
            first = loop.counter
            last = code.minimum(code.add(first, panel), m)
            self.load_panel(first, last)
            code.in_tiles(
                code.const(0), n, self.heights, lambda i, height: self._rows(i, height, first, last)
            )
        code.end()

    def load_panel(self, first: Value, last: Value) -> None:
        """Write some columns of R to scratch, as float32."""
        raise NotImplementedError

    def add(self, one: Value, other: Value, total: Value) -> Value:
        """Return one * other + total."""
        raise NotImplementedError

    def store(self, row: Value, j: Value, value: Value, lanes: int) -> None:
        """Store a vector of the result."""
        raise NotImplementedError

    def _rows(self, i: Value, height: int, first: Value, last: Value) -> None:
        """Write some rows of a panel, in tiles as wide as the registers allow."""
        code, lanes, vectors = self.code, self.target.lanes, vectors_of(self.target, height)
        length = code.builder.sub(last, first)
        end = code.add(first, code.round_down(length, vectors * lanes))
        with code.loop(first, end, vectors * lanes) as j:
            self._tile(i, j.counter, first, height, vectors, lanes)
        # The rest row by row: widths of models are multiples of 64.
        with code.loop(code.const(0), code.const(height), 1) as line:
            row = code.add(i, line.counter)
            whole = code.add(first, code.round_down(length, lanes))
            with code.loop(end, whole, lanes) as j:
                self._tile(row, j.counter, first, 1, 1, lanes)
            with code.loop(whole, last, 1) as j:
                self._tile(row, j.counter, first, 1, 1, 1)

    def _tile(
        self, i: Value, j: Value, first: Value, height: int, vectors: int, lanes: int
    ) -> None:
        """Write height rows of so many vectors."""
        code = self.code
        h_rows = code.rows(self.h, i, self.h_row, height)
        column = self.scratch_at(j, code.const(0), first)
        with code.loop(code.const(0), self.r, 1, [zero(lanes)] * (height * vectors)) as loop:
            source = code.at(column, code.times(loop.counter, self.scratch_row))
            rights = [
                code.load(code.at(source, code.const(4 * lanes * one)), vector(FLOAT, lanes))
                for one in range(vectors)
            ]
            offset = code.times(loop.counter, self.h_step)
            for line, row in enumerate(h_rows):
                h = code.broadcast(code.load(code.at(row, offset), FLOAT), lanes)
                for one, right in enumerate(rights):
                    place = line * vectors + one
                    loop.values[place] = self.add(h, right, loop.values[place])
        for line in range(height):
            row = code.add(i, code.const(line))
            factor = code.load(code.at(self.factors, code.times(row, self.factor_step)), FLOAT)
            factor = code.broadcast(factor, lanes)
            for one in range(vectors):
                value = code.builder.fmul(loop.values[line * vectors + one], factor)
                self.store(row, code.add(j, code.const(one * lanes)), value, lanes)

    def scratch_at(self, j: Value, k: Value, first: Value) -> Value:
        """Return the address of R[k, j] in a panel that begins with column `first`."""
        code = self.code
        offset = code.times(code.builder.sub(j, first), 4)
        return code.at(self.scratch, code.times(k, self.scratch_row), offset)


class WriteMerge(Outer):
    """Writes base + factor * H R, each operation rounded once, as the definition does."""

    heights = MERGED_HEIGHTS

    def __init__(self, target: Target, right_kind: Kind, base_kind: Kind) -> None:
        super().__init__(target, right_kind)
        self.base_kind = base_kind

    def load_panel(self, first: Value, last: Value) -> None:
        """Widen some columns of R (r, m)."""
        code = self.code
        place = code.at(self.right, code.times(first, size_of(self.right_kind)))
        with code.loop(code.const(0), self.r, 1) as k:
            source = code.at(place, code.times(k.counter, self.right_row))
            target = self.scratch_at(first, k.counter, first)
            length = code.builder.sub(last, first)
            convert(code, self.target.lanes, (source, self.right_kind), (target, "f32"), length)

    def add(self, one: Value, other: Value, total: Value) -> Value:
        """Return one * other + total, rounded twice: LLVM fuses only what asks for it."""
        return self.code.builder.fadd(total, self.code.builder.fmul(one, other))

    def store(self, row: Value, j: Value, value: Value, lanes: int) -> None:
        """Add a vector of the base, and store the sum rounded."""
        code, kind = self.code, self.base_kind
        base, base_row = code.arguments[14:]
        column = code.times(j, size_of(kind))
        place = code.at(base, code.times(row, base_row), column)
        out_place = code.at(self.out, code.times(row, self.out_row), column)
        value = code.builder.fadd(load_float32(code, place, kind, lanes), value)
        store_rounded(code, value, out_place, kind)


class WriteUp(Outer):
    """Writes factor * H B^T, one factor per row, where B is (m, r)."""

    heights = HEIGHTS

    def load_panel(self, first: Value, last: Value) -> None:
        """Transpose some rows of B (m, r), in squares and then number by number."""
        code, lanes = self.code, self.target.lanes
        whole = code.add(first, code.round_down(code.builder.sub(last, first), lanes))
        with code.loop(first, whole, lanes) as j:
            start = code.const(0)
            for side in (8, 4) if lanes >= 8 else (4,):
                end = code.add(start, code.round_down(code.builder.sub(self.r, start), side))
                with code.loop(start, end, side) as k:
                    self._transpose(j.counter, k.counter, first, side)
                start = end
            with (
                code.loop(start, self.r, 1) as k,
                code.loop(code.const(0), code.const(lanes), 1) as i,
            ):
                self._move(code.add(j.counter, i.counter), k.counter, first)
        with code.loop(whole, last, 1) as j, code.loop(code.const(0), self.r, 1) as k:
            self._move(j.counter, k.counter, first)

    def add(self, one: Value, other: Value, total: Value) -> Value:
        """Return one * other + total, fused where the CPU can."""
        return self.code.multiply_add(one, other, total)

    def store(self, row: Value, j: Value, value: Value, lanes: int) -> None:  # noqa: ARG002
        """Store a vector."""
        code = self.code
        code.store(value, code.at(self.out, code.times(row, self.out_row), code.times(j, 4)))

    def _b_at(self, j: Value, k: Value) -> Value:
        code = self.code
        offset = code.times(k, size_of(self.right_kind))
        return code.at(self.right, code.times(j, self.right_row), offset)

    def _move(self, j: Value, k: Value, first: Value) -> None:
        value = load_float32(self.code, self._b_at(j, k), self.right_kind, 1)
        self.code.store(value, self.scratch_at(j, k, first))

    def _transpose(self, j: Value, k: Value, first: Value, side: int) -> None:
        """Transpose `lanes` rows of `side` numbers to `side` vectors, by swapping larger squares.

        A vector starts as the rows t, t + side, ... side by side.
        """
        code, lanes = self.code, self.target.lanes
        rows = code.rows(self._b_at(code.const(0), k), j, self.right_row, lanes)
        vectors = []
        for t in range(side):
            parts = [load_float32(code, row, self.right_kind, side) for row in rows[t::side]]
            while len(parts) > 1:
                both = range(2 * parts[0].type.count)
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [code.shuffle(one, other, both) for one, other in pairs]
            vectors.append(parts[0])
        step = 1
        while step < side:
            kept = [i if not i & step else lanes + i - step for i in range(lanes)]
            given = [i + step if not i & step else lanes + i for i in range(lanes)]
            for t in (t for t in range(side) if not t & step):
                one, other = vectors[t], vectors[t + step]
                vectors[t] = code.shuffle(one, other, kept)
                vectors[t + step] = code.shuffle(one, other, given)
            step *= 2
        for t, value in enumerate(vectors):
            code.store(value, self.scratch_at(j, code.add(k, code.const(t)), first))
