"""A function that is being written: the little of a language that the kernels need."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir

from bonsai_lora.kernels.target import MACHINE

I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
BYTE, HALF, FLOAT = ir.IntType(8), ir.HalfType(), ir.FloatType()
POINTER, NOTHING = ir.PointerType(), ir.VoidType()

Value = Any
"""llvmlite's values and types have none of their own."""
Type = Any


class Loop:
    """A loop that is being written: its counter, and the values that each round hands on."""

    def __init__(self, counter: Value, values: Sequence[Value]) -> None:
        self.counter = counter
        self.values = list(values)


class Code:
    """A function that is being written. Offsets and strides are in bytes, counts are i64."""

    def __init__(
        self, module: ir.Module, name: str, arguments: Sequence[Type], result: Type = NOTHING
    ) -> None:
        self.function = ir.Function(module, ir.FunctionType(result, arguments), name)
        self.arguments: Sequence[Value] = self.function.args
        self.builder = ir.IRBuilder(self.function.append_basic_block())
        self._module = module

    # Numbers

    def const(self, value: int) -> Value:
        """Return a count."""
        return ir.Constant(I64, value)

    def add(self, *counts: Value) -> Value:
        """Return the sum of counts."""
        total, *others = counts
        for one in others:
            total = self.builder.add(total, one)
        return total

    def times(self, count: Value, factor: int | Value) -> Value:
        """Return a product of counts."""
        return self.builder.mul(count, self.const(factor) if isinstance(factor, int) else factor)

    def least(self, one: Value, other: Value) -> Value:
        """Return the smaller count."""
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def down_to(self, count: Value, multiple: int) -> Value:
        """Return the largest multiple up to a count."""
        return self.builder.sub(count, self.builder.srem(count, self.const(multiple)))

    # Memory

    def at(self, pointer: Value, *offsets: Value) -> Value:
        """Return the pointer moved by bytes."""
        return self.builder.gep(pointer, [self.add(*offsets)], source_etype=BYTE)

    def rows(self, pointer: Value, first: Value, stride: Value, count: int) -> list[Value]:
        """Return the places of so many rows."""
        places = [self.at(pointer, self.times(first, stride))]
        while len(places) < count:
            places.append(self.at(places[-1], stride))
        return places

    def load(self, pointer: Value, kind: Type) -> Value:
        """Return what lies there, aligned or not."""
        return self.builder.load(pointer, typ=kind, align=1)

    def store(self, value: Value, pointer: Value) -> None:
        """Write to where the pointer points, aligned or not."""
        self.builder.store(value, pointer, align=1)

    # Memory that threads share

    def atomic_load(self, pointer: Value) -> Value:
        """Return a count there, and see all that was written before it."""
        return self.builder.load_atomic(pointer, "acquire", 8, typ=I64)

    def atomic(self, change: str, pointer: Value, value: Value) -> Value:
        """Change a count ("add", "or", "xchg"); return what it was, in one order for all."""
        return self.builder.atomic_rmw(change, pointer, value, "seq_cst")

    def pause(self) -> None:
        """Tell the CPU that this loop waits."""
        if MACHINE in ("x86_64", "amd64"):
            self._call("llvm.x86.sse2.pause", NOTHING, [])
        elif MACHINE in ("aarch64", "arm64"):
            self._call("llvm.aarch64.hint", NOTHING, [ir.Constant(I32, 1)])

    def let_others_run(self) -> None:
        """Give the core to whoever waits for it."""
        if os.name == "posix":
            self._call("sched_yield", I32, [])

    # Vectors

    def spread(self, value: Value, lanes: int) -> Value:
        """Return a vector with the same number in all lanes; of one lane, the number."""
        if lanes == 1:
            return value
        undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, one: Value, other: Value, places: Sequence[int]) -> Value:
        """Return the lanes of two vectors (counted on) that `places` names."""
        mask = ir.Constant(vector(I32, len(places)), list(places))
        return self.builder.shuffle_vector(one, other, mask)

    def multiply_add(self, one: Value, other: Value, total: Value) -> Value:
        """Return one * other + total, rounded once where the CPU has that."""
        kind = total.type
        name = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self._call(f"llvm.fmuladd.{name}", kind, [one, other, total])

    def prefetch(self, pointer: Value, *, to_write: bool) -> None:
        """Ask for a cache line; nothing happens where there is none."""
        hints = [ir.Constant(I32, hint) for hint in (int(to_write), 2, 1)]
        self._call("llvm.prefetch.p0", NOTHING, [pointer, *hints])

    def call(self, name: str, arguments: Sequence[Value]) -> Value:
        """Call a function of the same module."""
        return self.builder.call(self._module.globals[name], arguments)

    def _call(self, name: str, result: Type, arguments: Sequence[Value]) -> Value:
        function = self._module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [one.type for one in arguments])
            function = ir.Function(self._module, kind, name)
        return self.builder.call(function, arguments)

    # Ways

    @contextlib.contextmanager
    def loop(
        self, start: Value, stop: Value, step: int | Value, values: Sequence[Value] = ()
    ) -> Iterator[Loop]:
        """Write a loop: `with` its body. The body changes `values`, which stay after the end."""
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
        loop = Loop(counter, carried)
        yield loop
        counter.add_incoming(
            builder.add(counter, self.const(step) if isinstance(step, int) else step), builder.block
        )
        for phi, value in zip(carried, loop.values, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        loop.values = carried

    @contextlib.contextmanager
    def forever(self) -> Iterator[Callable[[Value], None]]:
        """Write a loop: `with` its body. It is left by a return, or where what it gives is true."""
        body, end = (self.builder.append_basic_block() for _ in range(2))

        def leave_if(condition: Value) -> None:
            staying = self.builder.append_basic_block()
            self.builder.cbranch(condition, end, staying)
            self.builder.position_at_end(staying)

        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield leave_if
        self.builder.branch(body)
        self.builder.position_at_end(end)

    def in_tiles(
        self, start: Value, stop: Value, sizes: Sequence[int], body: Callable[[Value, int], None]
    ) -> None:
        """Write body(first, size) for all of start to stop, in the largest sizes that still fit.

        The last size is 1.
        """
        for size in sizes:
            end = self.add(start, self.down_to(self.builder.sub(stop, start), size))
            with self.loop(start, end, size) as loop:
                body(loop.counter, size)
            start = end

    def end(self, result: Value = None) -> None:
        """Write the return."""
        if result is None:
            self.builder.ret_void()
        else:
            self.builder.ret(result)


def vector(kind: Type, lanes: int) -> Type:
    """Return the type of so many numbers; of one, the number's."""
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def zero(lanes: int) -> Value:
    """Return float32 zeros."""
    return ir.Constant(vector(FLOAT, lanes), [0.0] * lanes if lanes > 1 else 0.0)
