"""Powers of ten, as the leading bits of each."""

from llvmlite import ir

from app.kernels.code import I64

LEAST, MOST = -300, 45
"""Of the table. To write float32 takes -31 to 45; numbers that are read, with 19 digits, more."""

TYPE = ir.ArrayType(ir.ArrayType(I64, 2), MOST - LEAST + 1)
BYTES = 16


def power_of_ten(exponent: int) -> int:
    """Return 10**exponent times a power of two, from 2**127 on and below 2**128.

    Rounded down; a power below 1 is rounded up.
    """
    power: int = 10 ** abs(exponent)
    if exponent >= 0:
        shift = 128 - power.bit_length()
        return power << shift if shift >= 0 else power >> -shift
    return -(-(1 << (127 + power.bit_length())) // power)


def write_powers(module: ir.Module) -> ir.GlobalVariable:
    """Write a table of pairs: the first 64 bits of each power, and the next 64."""
    table = ir.GlobalVariable(module, TYPE, "powers")
    table.global_constant, table.linkage = True, "internal"
    found = [power_of_ten(exponent) for exponent in range(LEAST, MOST + 1)]
    table.initializer = ir.Constant(TYPE, [[one >> 64, one & 2**64 - 1] for one in found])
    return table
