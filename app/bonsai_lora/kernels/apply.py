"""factor * (x A^T) B^T in one call: the down-projection to scratch, then the outer products."""

from functools import lru_cache

from llvmlite import ir

from bonsai_lora.kernels import down, outer
from bonsai_lora.kernels.code import POINTER, Code
from bonsai_lora.kernels.numbers import Kind
from bonsai_lora.kernels.target import Target

ARGUMENTS = "pnnnpnnnpnnpnpp"
"""a, r, a_row, d_in, b, b_row, d_out, panel, x, n, x_row, factors, factor_step, scratch
(`scratch_bytes`), out. Row i has its factor at factors + i * factor_step."""


@lru_cache
def scratch_bytes(n: int, r: int, panel: int) -> int:
    """Return the scratch bytes of an apply, aligned to a cache line."""
    hidden = -(-4 * n * r // 64) * 64  # x A^T, in whole cache lines
    return hidden + max(down.scratch_bytes(n, r), outer.scratch_bytes(r, panel))


def write_apply(code: Code, target: Target, kind: Kind) -> None:
    """Write the function, for A and B of one kind."""
    down.Down(target, kind).write(code.start("down", down.ARGUMENTS))
    outer.Outer(target, kind, None).write(code.start("outer", outer.ARGUMENTS))
    a, r, a_row, d_in, b, b_row, d_out, panel, x, n, x_row, *rest = code.arguments
    factors, factor_step, hidden, out = rest
    hidden_row = code.times(r, 4)
    hidden_bytes = code.round_down(code.add(code.times(n, hidden_row), code.const(63)), 64)
    scratch = code.at(hidden, hidden_bytes)
    code.call("down", [x, n, x_row, a, r, a_row, d_in, hidden, hidden_row, scratch])
    left = [hidden, n, hidden_row, code.const(4)]
    right = [b, r, b_row, d_out, panel, scratch, factors, factor_step]
    no_base = [ir.Constant(POINTER, None), code.const(0)]
    code.call("outer", [*left, *right, out, code.times(d_out, 4), *no_base])
    code.builder.ret_void()
