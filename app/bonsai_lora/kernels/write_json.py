"""float32 numbers as lists in JSON: the shortest decimals that read back the same.

The digits are found as in Raffaele Giulietti's "The Schubfach way to render doubles" (2021), for a
vector of numbers at a time; where several decimals are as short, the one next to the number is
taken. Then each is laid out by itself. (A float64 that is read from the shortest decimal and then
rounded is the same number again, with one exception: 7.038531e-26 becomes its neighbor.)
"""

from llvmlite import ir

from bonsai_lora.kernels.code import BYTE, I16, I32, I64, Code, Type, vector
from bonsai_lora.kernels.formula import Term, Variable, integer
from bonsai_lora.kernels.powers import BYTES, powers_from
from bonsai_lora.kernels.target import Target

ARGUMENTS = "nnnn"
"""x, rows, columns, out: writes a list for each row, with commas between; returns its length.
x is float32 (rows, columns) without gaps, all finite; `out` has room for `text_bytes`."""

BLOCK = 16
"""Numbers whose digits are found before they are laid out."""
_LONGEST = 17
"""Characters of a number and its comma: -0.0000100000025 or -9999999000000.0 at most."""
_LEAST_PLAIN, _MOST_PLAIN = -6, 12
"""Powers of ten of a number's first digit, where orjson writes it without an exponent."""
_ZEROS = 0x3030303030303030


def text_bytes(rows: int, columns: int) -> int:
    """Return how many bytes may be written, with what is then written over."""
    return rows * (columns * _LONGEST + 3) + 32


class Rows:
    """Generates the function."""

    def __init__(self, code: Code, target: Target) -> None:
        self.code = code
        self.lanes = max(2, target.lanes // 2)
        self.powers = powers_from(code)

    def write(self) -> None:
        """Write it all."""
        code = self.code
        x, rows, columns, out = (Term(code, one) for one in code.arguments)
        self.bits, self.words = self._room(I32), self._room(I64)
        self.firsts, self.exponents = self._room(I32), self._room(I32)
        self.at = Variable(out)
        with code.loop(integer(code, 0).value, rows.value, 1) as row:
            line = x + columns * 4 * Term(code, row.counter)
            self._put(ord("["))
            with code.loop(integer(code, 0).value, columns.value, BLOCK) as block:
                first = Term(code, block.counter)
                self._block(line + first * 4, columns - first)
            # A list without numbers has no last comma.
            self.at.now = self.at.now - columns.differs(0).to(I64)
            self._put(ord("]"))
            self._put(ord(","))
        self.at.now = self.at.now - rows.differs(0).to(I64)
        code.builder.ret((self.at.now - out).value)

    def _room(self, kind: Type) -> Term:
        builder = self.code.builder
        return Term(self.code, builder.ptrtoint(builder.alloca(ir.ArrayType(kind, BLOCK)), I64))

    def _put(self, character: int) -> None:
        self.at.now.store(self._byte(character))
        self.at.now = self.at.now + 1

    def _byte(self, character: int) -> Term:
        return integer(self.code, character).to(BYTE)

    def _block(self, x: Term, left: Term) -> None:
        """Write up to BLOCK numbers."""
        code = self.code
        count = (left < BLOCK).select(left, BLOCK)
        code.call_c("memcpy", I64, [self.bits.value, x.value, (count * 4).value])
        for lane in range(0, BLOCK, self.lanes):
            bits = (self.bits + 4 * lane).load(vector(I32, self.lanes))
            first, word, exponent = self._digits(bits)
            (self.firsts + 4 * lane).store(first)
            (self.words + 8 * lane).store(word)
            (self.exponents + 4 * lane).store(exponent)
        with code.loop(integer(code, 0).value, count.value, 1) as loop:
            self._format(Term(code, loop.counter))

    def _digits(self, bits: Term) -> tuple[Term, Term, Term]:
        """Return nine digits of each number, and the power of ten of the first.

        They are characters: the first (i32), and the other eight from the low byte up (i64).
        """
        fraction = bits & 0x7FFFFF
        raised = (bits >> 23) & 0xFF
        is_normal = (raised > 0).to(I32)
        # The number is c * 2^q. Between it and the next smaller one there is half as much where it
        # is a power of two.
        q = raised - is_normal - 149
        is_power = (fraction.equals(0) & (raised > 1)).to(I32)
        c = (fraction | (is_normal << 23)).to(I64)
        # 10^k is the power just below that distance. (1262611 / 2^22 is log10(2), 524031 / 2^22 is
        # log10(4/3), 1741647 / 2^19 is log2(10); right for all exponents of float32.)
        k = (q * 1262611 - is_power * 524031).arithmetic_shift(22)
        h = (q + (k * -1741647).arithmetic_shift(19) + 1).to(I64)
        g = self._powers(k)

        low, high = (c << 2 << h).times(g), (c << 2 << h).times(g >> 32)
        # Half the distance up and down, in the same fixed point.
        step_low, step_high = (g & 0xFFFFFFFF) << (h + 1), (g >> 32) << (h + 1)
        half = is_power.to(I64)
        middle = _rounded(low, high)
        upper = _rounded(low + step_low, high + step_high)
        # 256 more and less again, so that nothing is below 0.
        lower = low - (step_low >> half) + (256 << 32)
        lower = _rounded(lower, high - (step_high >> half) - 256)
        odd = c & 1
        lower, upper = lower + odd, upper - odd

        # One digit less, if one such decimal is in between; else the nearer with this many.
        shorter = ((middle >> 2).times(0xCCCCCCCD) >> 35).times(10)  # by 10, and back
        fits = lower <= shorter << 2
        next_fits = (shorter << 2) + 40 <= upper
        decimal = middle >> 2
        down_fits = lower <= decimal << 2
        up_fits = (decimal << 2) + 4 <= upper
        rest = middle & 3
        is_nearer = (rest > 2) | (rest.equals(2) & (decimal & 1).differs(0))
        is_up = (down_fits.differs(up_fits)).select(up_fits, is_nearer)
        decimal = fits.differs(next_fits).select(
            fits.select(shorter, shorter + 10), decimal + is_up.to(I64)
        )
        decimal = c.differs(0).select(decimal, 0)

        return self._characters(decimal, k + 8)

    def _characters(self, decimal: Term, exponent: Term) -> tuple[Term, Term, Term]:
        """Return nine digits of each decimal as characters, and the power of ten of the first."""
        for digits, more in ((5, 4), (5, 4), (7, 2), (8, 1)):
            is_low = decimal < 10**digits
            decimal = is_low.select(decimal.times(10**more), decimal)
            exponent = is_low.select(exponent - more, exponent)
        exponent = decimal.differs(0).select(exponent, 0)

        first = decimal.times(1441151881) >> 57  # by 10**8
        rest = decimal - first.times(10**8)
        high = rest.times(3518437209) >> 45  # by 10**4
        fours = (high | (rest - high.times(10**4)) << 32).bitcast(vector(I32, 2 * self.lanes))
        hundreds = (fours * 10486) >> 20  # by 100; right below 10**4
        pairs = (hundreds | (fours - hundreds * 100) << 16).bitcast(vector(I16, 4 * self.lanes))
        tens = (pairs * 103) >> 10  # by 10; right below 100
        word = (tens | (pairs - tens * 10) << 8).bitcast(vector(I64, self.lanes))
        return first.to(I32) + ord("0"), word | _ZEROS, exponent

    def _powers(self, k: Term) -> Term:
        """Return the leading 64 bits of 10^-k, and 1 more."""
        found = Term(self.code, ir.Constant(vector(I64, self.lanes), ir.Undefined))
        places = self.powers - k.to(I64, is_signed=True) * BYTES
        for lane in range(self.lanes):
            found = found.with_lane(lane, places.lane(lane).load(I64))
        return found + 1

    def _format(self, place: Term) -> None:
        """Write a number of the block, and a comma. What is written too far is written over."""
        code = self.code
        word = (self.words + place * 8).load(I64)
        first = (self.firsts + place * 4).load(I32).to(BYTE)
        exponent = (self.exponents + place * 4).load(I32).to(I64, is_signed=True)
        digits = integer(code, 9) - ((word - _ZEROS).leading_zeros() >> 3)
        at = self.at.now
        at.store(self._byte(ord("-")))
        at = at + ((self.bits + place * 4).load(I32) >> 31).to(I64)
        is_plain = (exponent - _LEAST_PLAIN).is_below(_MOST_PLAIN - _LEAST_PLAIN + 1)
        with code.builder.if_else(is_plain.value) as (plain, otherwise):
            with plain:
                # 0.00ddd, dd.ddd or dd00.0: the digits after zeros, or cut in two by the point.
                is_small = exponent < 0
                start = is_small.select(at + 1 - exponent, at)
                before = is_small.select(integer(code, 0), exponent)
                zeros = integer(code, _ZEROS)
                at.store(zeros)
                start.store(first)
                (start + 1).store(word)
                (start + 9).store(zeros)
                after = (before < 8).select(word >> ((before & 7) << 3), zeros)
                (is_small.select(start, at + exponent + 1) + 1).store(after)
                (at + before + 1).store(self._byte(ord(".")))
                least = exponent + 2
                long = (digits < least).select(least, digits) + 1
                self._end(at + is_small.select(digits + 1 - exponent, long))
            with otherwise:
                at.store(first)
                has_more = digits > 1
                (at + 1).store(self._byte(ord(".")))
                (at + 2).store(word)
                at = at + has_more.select(digits + 1, 1)
                at.store(self._byte(ord("e")))
                is_low = exponent < 0
                size = is_low.select(-exponent, exponent)
                sign = is_low.select(self._byte(ord("-")), self._byte(ord("+")))
                (at + 1).store(sign)
                tens = (size * 103) >> 10
                (at + 2).store((tens + ord("0")).to(BYTE))
                at = at + 2 + tens.differs(0).to(I64)
                at.store((size - tens * 10 + ord("0")).to(BYTE))
                self._end(at + 1)

    def _end(self, at: Term) -> None:
        at.store(self._byte(ord(",")))
        self.at.now = at + 1


def _rounded(low: Term, high: Term) -> Term:
    """Return high * 2^32 + low without its 64 low bits, the last one set where they are not 0."""
    product = high + (low >> 32)
    return (product >> 32) | (product & 0xFFFFFFFF).differs(0).to(I64)
