"""Generate LLVM functions with the few instructions that the kernels need.

Python runs once, to generate the function; the generated code runs at each call. So a Python `if`
or `for` selects or repeats instructions, while `loop`, `forever` and `builder.if_then` generate
branches.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
BYTE, HALF, FLOAT = ir.IntType(8), ir.HalfType(), ir.FloatType()
POINTER, NOTHING = ir.PointerType(), ir.VoidType()

_TYPES = {"p": POINTER, "n": I64, "": NOTHING}

Value = Any
"""A value in a generated function; llvmlite has no type for it."""
Type = Any


class Loop(NamedTuple):
    """A generated loop: its counter, and the values carried from one iteration to the next."""

    counter: Value
    values: list[Value]


class Code:
    """A generated function. Offsets and strides are in bytes, counts are i64.

    Argument and result types are letters: "p" for a pointer, "n" for an i64, "" for none.
    """

    def __init__(self, module: ir.Module, name: str, arguments: str, result: str = "") -> None:
        kind = ir.FunctionType(_TYPES[result], [_TYPES[one] for one in arguments])
        self.module = module
        self.function = ir.Function(module, kind, name)
        self.arguments: Sequence[Value] = self.function.args
        self.builder = ir.IRBuilder(self.function.append_basic_block())

    def start(self, name: str, arguments: str, result: str = "") -> "Code":
        """Return a new function of the same module, which this one may call."""
        code = Code(self.module, name, arguments, result)
        code.function.linkage = "internal"
        return code

    def const(self, value: int) -> Value:
        """Return a number as an i64."""
        return ir.Constant(I64, value)

    def add(self, *counts: Value) -> Value:
        """Return the sum of counts."""
        return functools.reduce(self.builder.add, counts)

    def times(self, count: Value, factor: int | Value) -> Value:
        """Return a product of counts."""
        return self.builder.mul(count, self.const(factor) if isinstance(factor, int) else factor)

    def minimum(self, one: Value, other: Value) -> Value:
        """Return the smaller count."""
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def round_down(self, count: Value, multiple: int) -> Value:
        """Return a count rounded down to a multiple."""
        return self.builder.sub(count, self.builder.srem(count, self.const(multiple)))

    def at(self, pointer: Value, *offsets: Value) -> Value:
        """Return the pointer moved by bytes."""
        return self.builder.gep(pointer, [self.add(*offsets)], source_etype=BYTE)

    def rows(self, pointer: Value, first: Value, stride: Value, count: int) -> list[Value]:
        """Return the addresses of `count` rows, from row `first` on."""
        places = [self.at(pointer, self.times(first, stride))]
        for _ in range(count - 1):
            places.append(self.at(places[-1], stride))
        return places

    def load(self, pointer: Value, kind: Type) -> Value:
        """Return the value at an address, aligned or not."""
        return self.builder.load(pointer, typ=kind, align=1)

    def store(self, value: Value, pointer: Value) -> None:
        """Store a value at an address, aligned or not."""
        self.builder.store(value, pointer, align=1)

    def broadcast(self, value: Value, lanes: int) -> Value:
        """Return a vector with this number in every lane; for one lane, the number itself."""
        if lanes == 1:
            return value
        undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, one: Value, other: Value, places: Sequence[int]) -> Value:
        """Return the lanes that `places` selects from the concatenation of two vectors."""
        mask = ir.Constant(vector(I32, len(places)), list(places))
        return self.builder.shuffle_vector(one, other, mask)

    def multiply_add(self, one: Value, other: Value, total: Value) -> Value:
        """Return one * other + total, fused (rounded once) if the CPU supports it."""
        kind = total.type
        name = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call_c(f"llvm.fmuladd.{name}", kind, [one, other, total])

    def prefetch(self, pointer: Value) -> None:
        """Prefetch a cache line; invalid addresses are harmless."""
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]
        self.call_c("llvm.prefetch.p0", NOTHING, [pointer, *hints])

    def call(self, name: str, arguments: Sequence[Value]) -> Value:
        """Call a function of the same module."""
        return self.builder.call(self.module.globals[name], arguments)

    def call_c(self, name: str, result: Type, arguments: Sequence[Value]) -> Value:
        """Call a function of LLVM or of the C library."""
        if name not in self.module.globals:
            kind = ir.FunctionType(result, [one.type for one in arguments])
            ir.Function(self.module, kind, name)
        return self.call(name, arguments)

    @contextlib.contextmanager
    def loop(
        self, start: Value, stop: Value, step: int | Value, values: Sequence[Value] = ()
    ) -> Iterator[Loop]:
        """Write a counted loop: `with` its body, which may replace the loop's `values`.

        They start as given; after the loop they are those of the last iteration.
        """
        builder = self.builder
        before = builder.block
        head, body, end = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        counter = builder.phi(I64)
        counter.add_incoming(start, before)
        carried = [builder.phi(value.type) for value in values]
        for phi, value in zip(carried, values, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", counter, stop), body, end)
        builder.position_at_end(body)
        loop = Loop(counter, [*carried])
        yield loop
        counter.add_incoming(
            builder.add(counter, self.const(step) if isinstance(step, int) else step), builder.block
        )
        for phi, value in zip(carried, loop.values, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        loop.values[:] = carried

    @contextlib.contextmanager
    def forever(self) -> Iterator[Callable[[Value], None]]:
        """Write an endless loop: `with` its body, which returns or calls the break that it gets."""
        body, end = (self.builder.append_basic_block() for _ in range(2))

        def break_if(condition: Value) -> None:
            staying = self.builder.append_basic_block()
            self.builder.cbranch(condition, end, staying)
            self.builder.position_at_end(staying)

        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield break_if
        self.builder.branch(body)
        self.builder.position_at_end(end)

    def in_tiles(
        self, start: Value, stop: Value, sizes: Sequence[int], body: Callable[[Value, int], None]
    ) -> None:
        """Write body(first, size) over start to stop, with the largest size that still fits.

        `sizes` are descending and end with 1.
        """
        for size in sizes:
            end = self.add(start, self.round_down(self.builder.sub(stop, start), size))
            with self.loop(start, end, size) as loop:
                body(loop.counter, size)
            start = end


def vector(kind: Type, lanes: int) -> Type:
    """Return the type of a vector; for one lane, that of the number."""
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def zero(lanes: int) -> Value:
    """Return float32 zeros."""
    return ir.Constant(vector(FLOAT, lanes), [0.0] * lanes if lanes > 1 else 0.0)
