"""Integer formulas, written with Python's operators."""

from collections.abc import Callable, Sequence
from typing import Union

from llvmlite import ir

from bonsai_lora.kernels.code import I32, I64, POINTER, Code, Type, Value

Operand = Union["Term", int]


def _method(instruction: str, *first: str) -> Callable[["Term", Operand], "Term"]:
    """Return the method that applies one of LLVM's instructions to two terms."""

    def method(self: "Term", other: Operand) -> "Term":
        return self.of(getattr(self.code.builder, instruction)(*first, *self.alike(other)))

    return method


class Term:
    """An integer computed by the function, or a vector of them; can be combined with plain numbers.

    `<`, `<=`, `>` and `>=` compare signed numbers; `>>` shifts in zeros.
    """

    def __init__(self, code: Code, value: Value) -> None:
        self.code = code
        self.value = value

    __add__ = _method("add")
    __sub__ = _method("sub")
    __mul__ = _method("mul")
    __and__ = _method("and_")
    __or__ = _method("or_")
    __lshift__ = _method("shl")
    __rshift__ = _method("lshr")
    arithmetic_shift = _method("ashr")
    __lt__ = _method("icmp_signed", "<")
    __le__ = _method("icmp_signed", "<=")
    __gt__ = _method("icmp_signed", ">")
    __ge__ = _method("icmp_signed", ">=")
    equals = _method("icmp_signed", "==")
    differs = _method("icmp_signed", "!=")
    is_below = _method("icmp_unsigned", "<")

    def of(self, value: Value) -> "Term":
        """Wrap a different value of the same function."""
        return Term(self.code, value)

    def __neg__(self) -> "Term":
        return self.of(self.code.builder.neg(self.value))

    def __invert__(self) -> "Term":
        return self.of(self.code.builder.not_(self.value))

    def select(self, one: "Term", other: Operand) -> "Term":
        """Return one value if this is true, and the other if it is false."""
        return self.of(self.code.builder.select(self.value, *one.alike(other)))

    def to(self, kind: Type, *, is_signed: bool = False) -> "Term":
        """Return it (each lane of a vector) as a wider or narrower integer."""
        builder, here = self.code.builder, self.value.type
        target = kind
        if isinstance(here, ir.VectorType):
            here, target = here.element, ir.VectorType(kind, here.count)
        if kind.width < here.width:
            return self.of(builder.trunc(self.value, target))
        return self.of((builder.sext if is_signed else builder.zext)(self.value, target))

    def bitcast(self, kind: Type) -> "Term":
        """Return its bits as another type's."""
        return self.of(self.code.builder.bitcast(self.value, kind))

    def trailing_zeros(self) -> "Term":
        """Return the number of trailing zero bits; all bits for 0."""
        return self.of(self.code.builder.cttz(self.value, ir.Constant(ir.IntType(1), 0)))

    def leading_zeros(self) -> "Term":
        """Return the number of leading zero bits; all bits for 0."""
        return self.of(self.code.builder.ctlz(self.value, ir.Constant(ir.IntType(1), 0)))

    def times(self, factor: Operand) -> "Term":
        """Return the product of the low 32 bits of both, in 64 bits."""
        # Masked, so that LLVM sees that one 32-bit multiplication is enough.
        low = 0xFFFFFFFF
        return (self & low) * (factor & low)

    def lane(self, place: int) -> "Term":
        """Return one lane of a vector."""
        return self.of(self.code.builder.extract_element(self.value, ir.Constant(I32, place)))

    def with_lane(self, place: int, value: "Term") -> "Term":
        """Return the vector with another value in one lane."""
        lane = ir.Constant(I32, place)
        return self.of(self.code.builder.insert_element(self.value, value.value, lane))

    def load(self, kind: Type) -> "Term":
        """Return the value at this address, aligned or not."""
        return self.of(self.code.load(self.code.builder.inttoptr(self.value, POINTER), kind))

    def store(self, value: "Term") -> None:
        """Store a value at this address, aligned or not."""
        self.code.store(value.value, self.code.builder.inttoptr(self.value, POINTER))

    def alike(self, other: Operand) -> tuple[Value, Value]:
        """Return both values in one type; a single number is broadcast to a vector's lanes."""
        kind = self.value.type
        lanes = kind.count if isinstance(kind, ir.VectorType) else 1
        if not isinstance(other, Term):
            return self.value, ir.Constant(kind, [other] * lanes if lanes > 1 else other)
        others = other.value.type
        if isinstance(others, ir.VectorType) and lanes == 1:
            return self.code.broadcast(self.value, others.count), other.value
        if lanes > 1 and not isinstance(others, ir.VectorType):
            return self.value, self.code.broadcast(other.value, lanes)
        return self.value, other.value


class Variable:
    """A local variable of the function: each assignment to `now` is a store, each read a load."""

    def __init__(self, first: Term) -> None:
        self._code = first.code
        self._kind = first.value.type
        with first.code.builder.goto_entry_block():
            self._place = first.code.builder.alloca(self._kind)
        self.now = first

    @property
    def now(self) -> Term:
        """Its value."""
        return Term(self._code, self._code.builder.load(self._place, typ=self._kind))

    @now.setter
    def now(self, value: Term) -> None:
        self._code.builder.store(value.value, self._place)


def table(code: Code, name: str, kind: Type, numbers: Sequence[float]) -> Term:
    """Return the address of a table of constants, which becomes part of the module."""
    made = ir.GlobalVariable(code.module, ir.ArrayType(kind, len(numbers)), name)
    made.global_constant, made.linkage = True, "internal"
    made.initializer = ir.Constant(made.value_type, list(numbers))
    return Term(code, code.builder.ptrtoint(made, I64))


def integer(code: Code, value: int) -> Term:
    """Return a number as an i64 term."""
    return Term(code, code.const(value))
