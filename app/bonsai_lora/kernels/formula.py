"""Formulas of integers, written with Python's operators."""

from collections.abc import Sequence
from typing import Union

from llvmlite import ir

from bonsai_lora.kernels.code import I32, I64, POINTER, Code, Type, Value

Operand = Union["Term", int]


class Term:
    """An integer, or a vector of them, that a function computes; others join as plain numbers.

    `<`, `<=`, `>` and `>=` see signs, `>>` does not (`shift_down` does).
    """

    def __init__(self, code: Code, value: Value) -> None:
        self.code = code
        self.value = value

    def __add__(self, other: Operand) -> "Term":
        return self._of(self.code.builder.add(*self.alike(other)))

    def __sub__(self, other: Operand) -> "Term":
        return self._of(self.code.builder.sub(*self.alike(other)))

    def __mul__(self, other: Operand) -> "Term":
        return self._of(self.code.builder.mul(*self.alike(other)))

    def __and__(self, other: Operand) -> "Term":
        return self._of(self.code.builder.and_(*self.alike(other)))

    def __or__(self, other: Operand) -> "Term":
        return self._of(self.code.builder.or_(*self.alike(other)))

    def __lshift__(self, other: Operand) -> "Term":
        return self._of(self.code.builder.shl(*self.alike(other)))

    def __rshift__(self, other: Operand) -> "Term":
        return self._of(self.code.builder.lshr(*self.alike(other)))

    def __neg__(self) -> "Term":
        return self._of(self.code.builder.neg(self.value))

    def __invert__(self) -> "Term":
        return self._of(self.code.builder.not_(self.value))

    def __lt__(self, other: Operand) -> "Term":
        return self._compare("<", other)

    def __le__(self, other: Operand) -> "Term":
        return self._compare("<=", other)

    def __gt__(self, other: Operand) -> "Term":
        return self._compare(">", other)

    def __ge__(self, other: Operand) -> "Term":
        return self._compare(">=", other)

    def shift_down(self, other: Operand) -> "Term":
        """Return it divided by a power of two, rounded down."""
        return self._of(self.code.builder.ashr(*self.alike(other)))

    def equals(self, other: Operand) -> "Term":
        """Return whether it is that."""
        return self._compare("==", other)

    def differs(self, other: Operand) -> "Term":
        """Return whether it is not."""
        return self._compare("!=", other)

    def is_below(self, other: Operand) -> "Term":
        """Return whether it is less, without signs."""
        return self._of(self.code.builder.icmp_unsigned("<", *self.alike(other)))

    def choose(self, one: "Term", other: Operand) -> "Term":
        """Return one where it is true, and the other where it is false."""
        return self._of(self.code.builder.select(self.value, *one.alike(other)))

    def to(self, kind: Type, *, is_signed: bool = False) -> "Term":
        """Return it as a longer or shorter integer; a vector's lanes."""
        builder, here = self.code.builder, self.value.type
        if isinstance(here, ir.VectorType):
            here, target = here.element, ir.VectorType(kind, here.count)
        else:
            target = kind
        if kind.width < here.width:
            return self._of(builder.trunc(self.value, target))
        return self._of((builder.sext if is_signed else builder.zext)(self.value, target))

    def seen_as(self, kind: Type) -> "Term":
        """Return its bits as another type's."""
        return self._of(self.code.builder.bitcast(self.value, kind))

    def trailing_zeros(self) -> "Term":
        """Return how many low bits are 0: all, where it is 0."""
        return self._of(self.code.builder.cttz(self.value, ir.Constant(ir.IntType(1), 0)))

    def leading_zeros(self) -> "Term":
        """Return how many high bits are 0: all, where it is 0."""
        return self._of(self.code.builder.ctlz(self.value, ir.Constant(ir.IntType(1), 0)))

    def times(self, factor: Operand) -> "Term":
        """Return the product, where both are numbers of 32 bits in 64."""
        # What is above is masked, so that LLVM sees that one short multiplication is enough.
        low = 0xFFFFFFFF
        other = factor & low
        return (self & low) * other

    def lane(self, place: int) -> "Term":
        """Return one of a vector's."""
        return self._of(self.code.builder.extract_element(self.value, ir.Constant(I32, place)))

    def with_lane(self, place: int, value: "Term") -> "Term":
        """Return a vector with another one there."""
        lane = ir.Constant(I32, place)
        return self._of(self.code.builder.insert_element(self.value, value.value, lane))

    def load(self, kind: Type) -> "Term":
        """Return what lies at this address, aligned or not."""
        return self._of(self.code.load(self._pointer(), kind))

    def store(self, value: "Term") -> None:
        """Write to this address, aligned or not."""
        self.code.store(value.value, self._pointer())

    def _pointer(self) -> Value:
        return self.code.builder.inttoptr(self.value, POINTER)

    def _of(self, value: Value) -> "Term":
        return Term(self.code, value)

    def _compare(self, sign: str, other: Operand) -> "Term":
        return self._of(self.code.builder.icmp_signed(sign, *self.alike(other)))

    def alike(self, other: Operand) -> tuple[Value, Value]:
        """Return the values of both, in one type: what is single is spread to a vector's lanes."""
        kind = self.value.type
        lanes = kind.count if isinstance(kind, ir.VectorType) else 1
        if not isinstance(other, Term):
            return self.value, ir.Constant(kind, [other] * lanes if lanes > 1 else other)
        others = other.value.type
        if isinstance(others, ir.VectorType) and lanes == 1:
            return self.code.spread(self.value, others.count), other.value
        if lanes > 1 and not isinstance(others, ir.VectorType):
            return self.value, self.code.spread(other.value, lanes)
        return self.value, other.value


class Variable:
    """What changes as a function runs."""

    def __init__(self, first: Term) -> None:
        self._code = first.code
        self._kind = first.value.type
        with first.code.builder.goto_entry_block():
            self._place = first.code.builder.alloca(self._kind)
        self.now = first

    @property
    def now(self) -> Term:
        """What it is."""
        return Term(self._code, self._code.builder.load(self._place, typ=self._kind))

    @now.setter
    def now(self, value: Term) -> None:
        self._code.builder.store(value.value, self._place)


def table(code: Code, name: str, kind: Type, numbers: Sequence[float]) -> Term:
    """Return the address of constants, written into the module."""
    made = ir.GlobalVariable(code.function.module, ir.ArrayType(kind, len(numbers)), name)
    made.global_constant, made.linkage = True, "internal"
    made.initializer = ir.Constant(made.value_type, list(numbers))
    return Term(code, code.builder.ptrtoint(made, I64))


def integer(code: Code, value: int) -> Term:
    """Return a plain number as an i64."""
    return Term(code, code.const(value))
