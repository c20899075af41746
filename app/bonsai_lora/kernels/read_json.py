"""Read lists of numbers in JSON text as float32.

A number becomes a float64 first, as with every reader of JSON, and then a float32. Up to 2^53 its
digits and a power of ten are float64 numbers themselves, so one division rounds right (William
Clinger, "How to read floating point numbers accurately", 1990). Others are multiplied by the
leading bits of a power of ten (Daniel Lemire, "Number parsing at a gigabyte per second", 2021;
Noble Mushtak and Daniel Lemire, "Fast number parsing without fallback", 2022).
"""

from llvmlite import ir

from bonsai_lora.kernels.code import BYTE, FLOAT, I32, I64, Code, vector
from bonsai_lora.kernels.formula import Term, Variable, integer, table
from bonsai_lora.kernels.powers import BYTES, LEAST, powers_from
from bonsai_lora.kernels.target import Target

ARGUMENTS = "nnnnnn"
"""text, length, start, least, out, found: reads the first list from `start` on that is all numbers,
or all lists of as many numbers, and has `least` of them. Returns 1 where there is one: `found`
(FOUND i64) gets where it begins and ends, its rows (0 for a list of numbers) and columns, and `out`
its numbers. It has room for one number for each two characters from `start` on.

Numbers are as RFC 8259 has them. Not read, nor their lists, are those whose digits make 2^64 or
more (or, in the last of a text, a little less), those whose last digit stands for less than 1e-300
or more than 1e38, and integers from 2^53 on, which NumPy would round to float32 at once.
"""
FOUND = 4
ROW = "nnnnn"
"""text, end, at, out, columns: reads a list that starts after its `[`. Returns its end, or 0."""

_WINDOW = 32
"""Characters that are loaded together."""
_BEFORE, _AFTER = 24, 40
"""Characters around the start of a number that may be loaded: 24 that end a fraction, and the
window, or 8 from any place in it, after a sign."""
_EXACT_POWERS = 22  # 10^22 is the largest exact float64
_MOST_POWER = 38  # one digit at the next is beyond float32
_DIGITS = 0x0F0F0F0F0F0F0F0F  # what is left of eight characters, where they are digits
_BIT, _I128, _DOUBLE = ir.IntType(1), ir.IntType(128), ir.DoubleType()


class Row:
    """Writes the function that reads a list of numbers."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.powers = powers_from(code)
        self.integer_powers = table(code, "integer_powers", I64, [10**n for n in range(20)])
        exact_powers = [float(10**n) for n in range(_EXACT_POWERS + 1)]
        self.exact_powers = table(code, "exact_powers", _DOUBLE, exact_powers)
        # The last digits of a stretch: none of what comes before them, and four bits of each.
        self.masks = table(code, "masks", BYTE, [0] * 24 + [15] * 24) + 24

    def write(self) -> None:
        """Write it all."""
        code = self.code
        text, self.end, at, out, columns = (Term(code, one) for one in code.arguments)
        self.at, self.to = Variable(at), Variable(out)
        self.digits, self.power, self.sign = (Variable(integer(code, 0)) for _ in range(3))
        self.is_integer, self.is_long, self.is_read = (Variable(self._flag(0)) for _ in range(3))
        first, last = text + _BEFORE, self.end - _AFTER
        with code.forever():
            skip_space(self.at, self.end)
            self.is_read.now = self._flag(0)
            is_inside = (first <= self.at.now) & (self.at.now <= last)
            with code.builder.if_then(is_inside.value, likely=True):
                self._read_fast()
            with code.builder.if_then((~self.is_read.now).value, likely=False):
                self._read_slowly()
            with code.builder.if_then((self._next() | 32).equals(ord("e")).value, likely=False):
                self._read_exponent()
            self._store_number()
            with code.builder.if_then(self._next().differs(ord(",")).value, likely=False):
                skip_space(self.at, self.end)
                with code.builder.if_then(self._next().differs(ord(",")).value):
                    self._fail_unless(self._next().equals(ord("]")))
                    columns.store((self.to.now - out) >> 2)
                    code.builder.ret((self.at.now + 1).value)
            self.at.now = self.at.now + 1
        code.builder.unreachable()

    def _flag(self, value: int) -> Term:
        return Term(self.code, ir.Constant(_BIT, value))

    def _fail_unless(self, condition: Term) -> None:
        with self.code.builder.if_then((~condition).value, likely=False):
            self.code.builder.ret(self.code.const(0))

    def _next(self) -> Term:
        """Return the next character; 0 at the end."""
        return character_at(self.at.now, self.end)

    def _read_fast(self) -> None:
        """Read a number up to its exponent, if it is all in the window, and move past it.

        Otherwise `is_read` is false, and `at` where it was.
        """
        code, builder, at = self.code, self.code.builder, self.at.now
        characters = at.load(vector(BYTE, _WINDOW))
        stops = _bits(characters.equals(ord(",")) | characters.equals(ord("]")))
        others = ~_bits((characters - ord("0")).is_below(10))
        # The start of the next number does not depend on the value of this one.
        stop = at + stops.trailing_zeros().to(I64)
        is_negative = at.load(BYTE).equals(ord("-"))
        start = at + is_negative.to(I64)
        others = others >> is_negative.to(I32)
        count = others.trailing_zeros().to(I64)
        point = start + count
        # No number begins with 0 but 0 itself and what is below 1.
        is_usual = count.equals(1) | start.load(BYTE).differs(ord("0"))
        is_usual = is_usual & (count - 1).is_below(8)
        with builder.if_then(is_usual.value, likely=True):
            digits = start.load(I64) << (integer(code, 64) - (count << 3))
            self.digits.now = _eight_digits(digits & _DIGITS)
            self.power.now = integer(code, 0)
            self.sign.now = is_negative.to(I64)
            self.is_long.now = self._flag(0)
            has_point = point.load(BYTE).equals(ord("."))
            self.is_integer.now = ~has_point
            self.is_read.now = ~has_point
            end = Variable(point)
            with builder.if_then(has_point.value, likely=True):
                behind = (others & (others - 1)).trailing_zeros().to(I64) - count - 1
                end.now = point + behind + 1
                with builder.if_then((behind - 1).is_below(24).value, likely=True):
                    self._read_fraction(end.now, behind)
            with builder.if_then(self.is_read.now.value, likely=True):
                # Mostly the same place, which LLVM must not see.
                self.at.now = stop
                is_end = end.now.load(BYTE).differs(ord(","))
                with builder.if_then(is_end.value, likely=False):
                    self.at.now = end.now

    def _read_fraction(self, stop: Term, count: Term) -> None:
        """Read so many digits (1 to 24) that end at `stop`, behind those that are read."""
        code = self.code
        low, high, top = (
            _eight_digits((stop - size).load(I64) & (self.masks + count - size).load(I64))
            for size in (8, 16, 24)
        )
        value = high * 10**8 + low
        self.power.now = -count
        # Mostly 2^53 and more: all of these are rounded, so that the CPU can guess which way to go.
        self.is_long.now = count > 15
        with code.builder.if_else((count > 15).value, likely=False) as (long, short):
            with long:
                scale = (self.integer_powers + ((count - 16) << 3)).load(I64)
                self._join(self.digits.now * scale + top, integer(code, 10**16), value)
            with short:
                scale = (self.integer_powers + (count << 3)).load(I64)
                self._join(self.digits.now, scale, value)

    def _join(self, before: Term, scale: Term, value: Term) -> None:
        """Set the digits, if they are below 2^64."""
        joined = before.to(_I128) * scale.to(_I128) + value.to(_I128)
        self.digits.now = joined.to(I64)
        self.is_read.now = (joined >> 64).equals(0)

    def _read_slowly(self) -> None:
        """Read any number up to its exponent, a character at a time, and move past it."""
        builder, none = self.code.builder, integer(self.code, 0)
        self.digits.now, self.power.now = none, none
        self.is_integer.now, self.is_long.now = self._flag(1), self._flag(0)
        self.sign.now = self._next().equals(ord("-")).to(I64)
        self.at.now = self.at.now + self.sign.now
        is_zero = self._next().equals(ord("0"))
        start = self.at.now
        self._read_digits()
        self._fail_unless(~is_zero | (self.at.now - start).equals(1))
        with builder.if_then(self._next().equals(ord(".")).value):
            self.is_integer.now = self._flag(0)
            self.at.now = self.at.now + 1
            start = self.at.now
            self._read_digits()
            self.power.now = start - self.at.now

    def _read_exponent(self) -> None:
        """Read an exponent, at its `e`, and move past it."""
        self.is_integer.now = self._flag(0)
        self.at.now = self.at.now + 1
        sign = self._next()
        is_negative = sign.equals(ord("-"))
        self.at.now = self.at.now + (is_negative | sign.equals(ord("+"))).to(I64)
        before = self.digits.now
        self.digits.now = integer(self.code, 0)
        self._read_digits()
        size = self.digits.now
        self._fail_unless(size.is_below(1000))  # not clipped: zeros may take it back into range
        self.power.now = self.power.now + is_negative.select(-size, size)
        self.digits.now = before

    def _read_digits(self) -> None:
        """Read one digit or more."""
        start = self.at.now
        with self.code.forever() as break_if:
            digit = self._next().to(I64) - ord("0")
            break_if((~digit.is_below(10)).value)
            # So that ten times as many and nine are below 2^64.
            self._fail_unless(self.digits.now.is_below(2**64 // 10))
            self.digits.now = self.digits.now * 10 + digit
            self.at.now = self.at.now + 1
        self._fail_unless(self.at.now.differs(start))

    def _store_number(self) -> None:
        """Write the number that was read."""
        code, builder = self.code, self.code.builder
        digits, power = self.digits.now, self.power.now
        is_exact = digits.is_below(1 << 53) & (power + _EXACT_POWERS).is_below(_EXACT_POWERS + 1)
        is_exact = is_exact & ~self.is_long.now
        bits = Variable(integer(code, 0))
        with builder.if_else(is_exact.value, likely=True) as (exact, otherwise):
            with exact:
                exact_power = (self.exact_powers + (-power << 3)).load(_DOUBLE)
                number = builder.fdiv(builder.sitofp(digits.value, _DOUBLE), exact_power.value)
                bits.now = Term(code, number).bitcast(I64)
            with otherwise, builder.if_then(digits.differs(0).value):
                self._fail_unless(~self.is_integer.now)
                self._fail_unless((power - LEAST).is_below(_MOST_POWER - LEAST + 1))
                bits.now = self._rounded(digits, power)
        # A whole number has no sign where it is 0.
        is_signed = ~self.is_integer.now | digits.differs(0)
        sign = is_signed.select(self.sign.now, 0) << 63
        number = (bits.now | sign).bitcast(_DOUBLE)
        self.to.now.store(Term(code, builder.fptrunc(number.value, FLOAT)))
        self.to.now = self.to.now + 4

    def _rounded(self, digits: Term, power: Term) -> Term:
        """Return the bits of the float64 next to digits * 10^power, for digits that are not 0."""
        code = self.code
        zeros = digits.leading_zeros()
        raised = digits << zeros
        place = self.powers + power * BYTES
        product = raised.to(_I128) * place.load(I64).to(_I128)
        found = Variable(product)
        # Where all bits that are cut off are set, the next 64 of the power may carry into them.
        may_carry = ((product >> 64).to(I64) & 0x1FF).equals(0x1FF)
        with code.builder.if_then(may_carry.value, likely=False):
            more = raised.to(_I128) * (place + 8).load(I64).to(_I128)
            found.now = product + (more >> 64)
        high, low = (found.now >> 64).to(I64), found.now.to(I64)
        top = high >> 63
        cut = top + 9
        mantissa = high >> cut
        # In the middle of two float64 numbers; only these powers of five are short enough for it.
        is_middle = low.is_below(2) & (power + 4).is_below(28) & (mantissa & 3).equals(1)
        is_middle = is_middle & (mantissa << cut).equals(high)
        mantissa = is_middle.select(mantissa - 1, mantissa)
        mantissa = (mantissa + (mantissa & 1)) >> 1
        # 217706 / 2^16 is the binary logarithm of ten.
        exponent = (power * 217706).arithmetic_shift(16) + 63 + top - zeros + 1023
        return mantissa + ((exponent - 1) << 52)


def write_find(code: Code, _target: Target) -> None:
    """Write the function that finds a list."""
    Row(code.start("row", ROW, "n")).write()
    builder, none = code.builder, integer(code, 0)
    text, length, start, least, out, found = (Term(code, one) for one in code.arguments)
    end = text + length
    at, columns, rows = Variable(text + start), Variable(none), Variable(none)
    row_columns = Term(code, builder.ptrtoint(builder.alloca(I64), I64))
    with code.forever():
        _seek(at, end)
        begin = at.now
        at.now = begin + 1
        skip_space(at, end)
        rows.now, columns.now = none, none
        with builder.if_else(character_at(at.now, end).equals(ord("[")).value) as (deep, flat):
            with deep, code.forever() as break_if:
                # At the [ of a row.
                target = out + (rows.now * columns.now << 2)
                arguments = [one.value for one in (text, end, at.now + 1, target, row_columns)]
                at.now = Term(code, code.call("row", arguments))
                break_if(at.now.equals(0).value)
                rows.now = rows.now + 1
                is_first = rows.now.equals(1)
                columns.now = is_first.select(row_columns.load(I64), columns.now)
                skip_space(at, end)
                after = character_at(at.now, end)
                at.now = at.now + 1
                with builder.if_then(after.equals(ord(",")).value):
                    skip_space(at, end)
                is_regular = columns.now.equals(row_columns.load(I64))
                has_next = after.equals(ord(",")) & character_at(at.now, end).equals(ord("["))
                is_done = is_regular & after.equals(ord("]"))
                at.now = (is_regular & (has_next | is_done)).select(at.now, 0)
                break_if((is_done | at.now.equals(0)).value)
            with flat:
                arguments = [one.value for one in (text, end, begin + 1, out, row_columns)]
                at.now = Term(code, code.call("row", arguments))
                columns.now = at.now.differs(0).select(row_columns.load(I64), none)
        is_read = at.now.differs(0)
        count = (rows.now > 0).select(rows.now, 1) * columns.now
        with builder.if_then((is_read & (count >= least)).value):
            for place, value in enumerate((begin - text, at.now - text, rows.now, columns.now)):
                (found + 8 * place).store(value)
            code.builder.ret(code.const(1))
        at.now = is_read.select(at.now, begin + 1)
    builder.unreachable()


def character_at(address: Term, end: Term) -> Term:
    """Return the character there, or 0 from the end on."""
    is_inside = address < end
    return is_inside.select(is_inside.select(address, end - 1).load(BYTE), 0)


def skip_space(at: Variable, end: Term) -> None:
    """Move over white space."""
    code = end.code
    with code.forever() as break_if:
        character = character_at(at.now, end)
        break_if((character > ord(" ")).value)
        is_space = character.equals(ord(" ")) | character.equals(ord("\n"))
        is_space = is_space | character.equals(ord("\t")) | character.equals(ord("\r"))
        break_if((~is_space).value)
        at.now = at.now + 1


def _seek(at: Variable, end: Term) -> None:
    """Move to the next `[`; return 0 if there is no other."""
    code, start = end.code, at.now
    bracket = ir.Constant(I32, ord("["))
    found = code.call_c("memchr", I64, [start.value, bracket, (end - start).value])
    at.now = Term(code, found)
    with code.builder.if_then(at.now.equals(0).value):
        code.builder.ret(code.const(0))


def _bits(lanes: Term) -> Term:
    """Return a bit for each of a window's characters."""
    return lanes.bitcast(I32)


def _eight_digits(characters: Term) -> Term:
    """Return the number of eight digits, each the low four bits of a byte."""
    pairs = (characters * (10 * 2**8 + 1)) >> 8
    fours = ((pairs & 0x00FF00FF00FF00FF) * (100 * 2**16 + 1)) >> 16
    return ((fours & 0x0000FFFF0000FFFF) * (10000 * 2**32 + 1)) >> 32
