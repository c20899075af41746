"""A table of the leading bits of powers of ten."""

from bonsai_lora.kernels.code import I64, Code
from bonsai_lora.kernels.formula import Term, table

LEAST, MOST = -300, 45
"""Range of the table. Writing float32 needs -31 to 45; reading numbers of 19 digits needs more."""
BYTES = 16  # of each power in the table


def power_of_ten(exponent: int) -> int:
    """Return 10**exponent times a power of two, from 2**127 on and below 2**128.

    Rounded down; a power below 1 is rounded up.
    """
    power: int = 10 ** abs(exponent)
    if exponent >= 0:
        shift = 128 - power.bit_length()
        return power << shift if shift >= 0 else power >> -shift
    return -(-(1 << (127 + power.bit_length())) // power)


def powers_from(code: Code) -> Term:
    """Return the address of 10**0 in a table: the first 64 bits of each power, and the next 64."""
    found = [power_of_ten(exponent) for exponent in range(LEAST, MOST + 1)]
    halves = [half for one in found for half in (one >> 64, one & 2**64 - 1)]
    return table(code, "powers", I64, halves) + -LEAST * BYTES
