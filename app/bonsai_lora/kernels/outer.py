"""Sums of outer products: an apply's second product, and all of a merge.

product = np.zeros((n, m), np.float32)
for k in range(r):
    product += h[:, k, None] * right[k]
out[:] = factors[:, None] * product       # an apply, where `right` is B transposed
out[:] = base + factor * product          # a merge, each operation rounded once
"""

from bonsai_lora.kernels.code import FLOAT, Code, Value, vector, zero
from bonsai_lora.kernels.numbers import Kind, convert, load_float32, size_of, store_rounded
from bonsai_lora.kernels.target import Target

HEIGHTS = (6, 2, 1)
"""Rows of a tile: 6 take 4 vectors (2 where registers are few), 1 takes 8."""
_MERGE_HEIGHTS = (4, 1)
"""With a base, which is also read and written: fewer rows with distant addresses."""
_MOST_LANES, _SIDE = 16, 4
ARGUMENTS = "pnnnpnnnnppnpnpn"
"""h, n, h_row, h_step, right, r, right_row, m, panel, scratch (`scratch_bytes`), factors,
factor_step, out, out_row, base, base_row. `right` is R (r, m) in a merge, B (m, r) in an apply,
which has no base."""


def scratch_bytes(r: int, panel: int) -> int:
    """Return the scratch bytes of a panel, aligned to a cache line."""
    return 4 * r * (panel + _MOST_LANES)


class Outer:
    """Generates sums of outer products, one panel of columns after another, widened to scratch."""

    def __init__(self, target: Target, right_kind: Kind, base_kind: Kind | None) -> None:
        self.target = target
        self.right_kind = right_kind
        self.base_kind = base_kind

    def write(self, code: Code) -> None:
        """Write the function."""
        self.code = code
        (self.h, n, self.h_row, self.h_step, self.right, self.r, self.right_row, m, panel) = (
            code.arguments[:9]
        )
        self.scratch, self.factors, self.factor_step, *places = code.arguments[9:]
        self.out, self.out_row, self.base, self.base_row = places
        # One more vector, so that the rows of a wide panel do not share the same cache sets.
        self.scratch_row = code.times(code.add(panel, code.const(self.target.lanes)), 4)
        heights = HEIGHTS if self.base_kind is None else _MERGE_HEIGHTS
        with code.loop(code.const(0), m, panel) as loop:
            first = loop.counter
            last = code.minimum(code.add(first, panel), m)
            if self.base_kind is None:
                self._transpose(first, last)
            else:
                self._widen(first, last)

            def rows(i: Value, height: int) -> None:
                widest = self.target.vectors_of(height) * self.target.lanes

                def tile(j: Value, width: int) -> None:
                    self._tile(i, j, first, height, width)

                code.in_tiles(first, last, (widest, self.target.lanes, 1), tile)

            code.in_tiles(code.const(0), n, heights, rows)
        code.builder.ret_void()

    def _tile(self, i: Value, j: Value, first: Value, height: int, width: int) -> None:
        """Write some rows of some columns, in vectors or, where `width` is 1, in single numbers."""
        code, lanes = self.code, min(width, self.target.lanes)
        vectors = width // lanes
        h_rows = code.rows(self.h, i, self.h_row, height)
        column = self._scratch_at(j, code.const(0), first)
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
                    loop.values[place] = self._add(h, right, loop.values[place])
        for line in range(height):
            row = code.add(i, code.const(line))
            factor = code.load(code.at(self.factors, code.times(row, self.factor_step)), FLOAT)
            factor = code.broadcast(factor, lanes)
            for one in range(vectors):
                value = code.builder.fmul(loop.values[line * vectors + one], factor)
                self._store(row, code.add(j, code.const(one * lanes)), value, lanes)

    def _add(self, one: Value, other: Value, total: Value) -> Value:
        """Return total + one * other; fused in an apply, rounded twice in a merge."""
        if self.base_kind is None:
            return self.code.multiply_add(one, other, total)
        return self.code.builder.fadd(total, self.code.builder.fmul(one, other))

    def _store(self, row: Value, j: Value, value: Value, lanes: int) -> None:
        """Store a vector of the result, in a merge added to the base."""
        code, kind = self.code, self.base_kind
        column = code.times(j, size_of(kind or "f32"))
        place = code.at(self.out, code.times(row, self.out_row), column)
        if kind is None:
            code.store(value, place)
            return
        base = code.at(self.base, code.times(row, self.base_row), column)
        value = code.builder.fadd(load_float32(code, base, kind, lanes), value)
        store_rounded(code, value, place, kind)

    def _widen(self, first: Value, last: Value) -> None:
        """Write columns of R (r, m) to scratch."""
        code = self.code
        place = code.at(self.right, code.times(first, size_of(self.right_kind)))
        with code.loop(code.const(0), self.r, 1) as k:
            source = code.at(place, code.times(k.counter, self.right_row)), self.right_kind
            target = self._scratch_at(first, k.counter, first)
            length = code.builder.sub(last, first)
            convert(code, self.target.lanes, source, (target, "f32"), length)

    def _transpose(self, first: Value, last: Value) -> None:
        """Write rows of B (m, r) to scratch as columns: in square blocks, the rest one by one."""
        code, lanes, none = self.code, self.target.lanes, self.code.const(0)
        end = code.add(first, code.round_down(code.builder.sub(last, first), lanes))
        whole = code.round_down(self.r, _SIDE)
        with code.loop(first, end, lanes) as j, code.loop(none, whole, _SIDE) as k:
            self._transpose_square(j.counter, k.counter, first)
        with code.loop(first, end, 1) as j, code.loop(whole, self.r, 1) as k:
            self._move(j.counter, k.counter, first)
        with code.loop(end, last, 1) as j, code.loop(none, self.r, 1) as k:
            self._move(j.counter, k.counter, first)

    def _b_at(self, j: Value, k: Value) -> Value:
        code = self.code
        offset = code.times(k, size_of(self.right_kind))
        return code.at(self.right, code.times(j, self.right_row), offset)

    def _move(self, j: Value, k: Value, first: Value) -> None:
        value = load_float32(self.code, self._b_at(j, k), self.right_kind, 1)
        self.code.store(value, self._scratch_at(j, k, first))

    def _transpose_square(self, j: Value, k: Value, first: Value) -> None:
        """Transpose `lanes` rows of _SIDE numbers: swap single numbers, then pairs of them.

        A vector starts as the rows t, t + _SIDE, ... side by side.
        """
        code, lanes = self.code, self.target.lanes
        rows = code.rows(self._b_at(code.const(0), k), j, self.right_row, lanes)
        vectors = []
        for t in range(_SIDE):
            parts = [load_float32(code, row, self.right_kind, _SIDE) for row in rows[t::_SIDE]]
            while len(parts) > 1:
                both = range(2 * parts[0].type.count)
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [code.shuffle(one, other, both) for one, other in pairs]
            vectors += parts
        for step, swapped in ((1, ((0, 1), (2, 3))), (2, ((0, 2), (1, 3)))):
            kept = [i if not i & step else lanes + i - step for i in range(lanes)]
            given = [i + step if not i & step else lanes + i for i in range(lanes)]
            for t, u in swapped:
                one, other = vectors[t], vectors[u]
                vectors[t], vectors[u] = (code.shuffle(one, other, to) for to in (kept, given))
        for t, value in enumerate(vectors):
            code.store(value, self._scratch_at(j, code.add(k, code.const(t)), first))

    def _scratch_at(self, j: Value, k: Value, first: Value) -> Value:
        """Return the address of R[k, j] in a panel that starts at column `first`."""
        code = self.code
        offset = code.times(code.builder.sub(j, first), 4)
        return code.at(self.scratch, code.times(k, self.scratch_row), offset)
