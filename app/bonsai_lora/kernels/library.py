"""The kernels as callable functions, each compiled on first use."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

from bonsai_lora.kernels import apply, numbers, outer, read_json, write_json
from bonsai_lora.kernels.code import Code
from bonsai_lora.kernels.numbers import Kind
from bonsai_lora.kernels.target import Target

Call = Callable[..., int]
"""A compiled function. Pointers are addresses, strides are bytes."""

_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "": None}


class Kernel(NamedTuple):
    """How to generate a function."""

    write: Callable[..., None]
    """Called with the `Code`, the target and the kinds of numbers."""
    arguments: str
    result: str = ""
    level: int = 0
    """LLVM's optimization level: 0 for loops that are generated in their final form (2 would take
    three times as long for no gain), 2 for code with variables and branches."""


KERNELS = {
    "apply": Kernel(apply.write_apply, apply.ARGUMENTS),
    "merge": Kernel(lambda code, *kinds: outer.Outer(*kinds).write(code), outer.ARGUMENTS),
    "cast": Kernel(numbers.write_cast, numbers.ARGUMENTS),
    "find": Kernel(read_json.write_find, read_json.ARGUMENTS, "n", level=2),
    "write": Kernel(
        lambda code, target: write_json.Rows(code, target).write(),
        write_json.ARGUMENTS,
        "n",
        level=2,
    ),
}
"""Kinds of numbers: apply, of A and B; merge, of R, and of base and out; cast, from and to."""


class Library:
    """The functions for one kind of CPU."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._made: dict[tuple[str, ...], Call] = {}
        self._lock = threading.Lock()

    def get(self, name: str, *kinds: Kind) -> Call:
        """Return a function of KERNELS; other threads wait while it is compiled."""
        function = self._made.get((name, *kinds))
        if function is None:
            with self._lock:
                function = self._made.get((name, *kinds)) or self._compile(name, *kinds)
                self._made[name, *kinds] = function
        return function

    def _compile(self, name: str, *kinds: Kind) -> Call:
        kernel = KERNELS[name]
        module = ir.Module()
        kernel.write(Code(module, name, kernel.arguments, kernel.result), self._target, *kinds)
        engine = machine_code(str(module), self._target, kernel.level)
        result, *arguments = (_TYPES[one] for one in (kernel.result, *kernel.arguments))
        function = ctypes.CFUNCTYPE(result, *arguments)(engine.get_function_address(name))
        function.engine = engine  # type: ignore[attr-defined]  # lives as long as it
        return function


def machine_code(text: str, target: Target, level: int) -> Any:
    """Return an engine that keeps the functions of a module in memory during its lifetime."""
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
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    engine.remove_module(module)  # only the machine code is needed from that point on
    return engine
