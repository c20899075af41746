"""The kernels as functions, each compiled when it is first asked for."""

import ctypes
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir

from bonsai_lora.kernels import apply, down, outer, read_json, write_json
from bonsai_lora.kernels.code import I64, NOTHING, POINTER, Code, Type
from bonsai_lora.kernels.numbers import Kind, write_cast
from bonsai_lora.kernels.target import Target

Call = Callable[..., int]
"""A compiled function. Pointers are addresses, strides are bytes."""

T = TypeVar("T")

_TYPES: dict[str, tuple[Type, Any]] = {
    "p": (POINTER, ctypes.c_void_p),
    "n": (I64, ctypes.c_int64),
    "": (NOTHING, None),
}


class Library:
    """The functions for one kind of CPU."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.apply = _made_once(self._apply)
        self.merge = _made_once(self._merge)
        self.cast = _made_once(self._cast)
        self.read_json = _made_once(self._read_json)
        self.write_json = _made_once(self._write_json)

    def _apply(self, kind: Kind) -> Call:
        """Return apply(`apply.ARGUMENTS`), for A and B of one kind."""
        module = ir.Module()
        down.Down(self.target, kind).write(_start(module, "down", down.ARGUMENTS))
        outer.WriteUp(self.target, kind).write(_start(module, "up", outer.ARGUMENTS))
        apply.write_apply(_start(module, "apply", apply.ARGUMENTS))
        return self._compile(module, "apply", apply.ARGUMENTS)

    def _merge(self, right_kind: Kind, base_kind: Kind) -> Call:
        """Return merge(`outer.MERGE_ARGUMENTS`), `base` and `out` of one kind."""
        module = ir.Module()
        kernel = outer.WriteMerge(self.target, right_kind, base_kind)
        kernel.write(_start(module, "merge", outer.MERGE_ARGUMENTS))
        return self._compile(module, "merge", outer.MERGE_ARGUMENTS)

    def _cast(self, from_kind: Kind, to_kind: Kind) -> Call:
        """Return cast(array, out, n)."""
        module = ir.Module()
        write_cast(_start(module, "cast", "ppn"), self.target, from_kind, to_kind)
        return self._compile(module, "cast", "ppn")

    def _read_json(self) -> Call:
        """Return find(`read_json.FIND`)."""
        module = ir.Module()
        row = _start(module, "row", read_json.ROW, "n")
        row.function.linkage = "internal"
        read_json.Row(row).write()
        read_json.write_find(_start(module, "find", read_json.FIND, "n"))
        return self._compile(module, "find", read_json.FIND, "n", level=2)

    def _write_json(self) -> Call:
        """Return write(`write_json.ARGUMENTS`)."""
        module = ir.Module()
        write_json.Rows(self.target, _start(module, "write", write_json.ARGUMENTS, "n")).write()
        return self._compile(module, "write", write_json.ARGUMENTS, "n", level=2)

    def _compile(
        self, module: ir.Module, name: str, arguments: str, result: str = "", level: int = 0
    ) -> Call:
        compiled = Compiled(str(module), name, self.target, level)
        prototype = ctypes.CFUNCTYPE(_TYPES[result][1], *(_TYPES[one][1] for one in arguments))
        function = prototype(compiled.address)
        function.compiled = compiled  # type: ignore[attr-defined]  # lives as long as it
        return function


class Compiled:
    """A function in memory; it goes when this goes.

    `level` is how much LLVM optimises: 0 for loops that are written out as they are to be (2 would
    take three times as long and gain nothing), 2 where there are variables and branches.
    """

    def __init__(self, text: str, name: str, target: Target, level: int) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(text)
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=target.cpu, features=target.features, opt=2, jit=True
        )
        if level:
            tuning = llvm.create_pipeline_tuning_options(speed_level=level)
            passes = llvm.create_pass_builder(machine, tuning)
            passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(name)
        self._engine.remove_module(module)  # machine code is all that is needed from here on


def _made_once(make: Callable[..., T]) -> Callable[..., T]:
    """Return `make` with a memory; threads that ask for the same meanwhile wait for it."""
    made: dict[Any, T] = {}
    lock = threading.Lock()

    def get(*kinds: Kind) -> T:
        with lock:
            if kinds not in made:
                made[kinds] = make(*kinds)
            return made[kinds]

    return lru_cache(get)  # which is faster, but lets several threads make the same


def _start(module: ir.Module, name: str, arguments: str, result: str = "") -> Code:
    return Code(module, name, [_TYPES[one][0] for one in arguments], _TYPES[result][0])
