"""The kernels as functions, made when they are first asked for."""

import ctypes
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir

from bonsai_lora.kernels import apply, crew, down, outer, read_json, write_json
from bonsai_lora.kernels.code import FLOAT, I64, NOTHING, POINTER, Code, Type
from bonsai_lora.kernels.numbers import Kind, write_cast
from bonsai_lora.kernels.target import Target, host

Call = Callable[..., float]

T = TypeVar("T")

_TYPES: dict[str, tuple[Type, Any]] = {
    "p": (POINTER, ctypes.c_void_p),
    "n": (I64, ctypes.c_int64),
    "f": (FLOAT, ctypes.c_float),
    "": (NOTHING, None),
}


class Apply(NamedTuple):
    """The functions of an apply, for A and B of one kind (bonsai_lora.kernels.apply)."""

    alone: Call
    """With `apply.ARGUMENTS`; returns 0, or NaN where x A^T is not finite."""
    part: Call
    """Does a part of it: `apply.PART`."""


class CrewFunctions(NamedTuple):
    """The functions by which threads share out a job (bonsai_lora.kernels.crew)."""

    share: Call
    """(shared, parts, function, ...): returns what the function does for part 0, or who sleeps."""
    finish: Call
    """(shared, parts): returns that once those are woken."""
    serve: Call
    """(shared, part, parts, seen, patience): what the others do."""


class Kernels:
    """The functions for a target. Pointers are addresses, strides are bytes."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.apply = _made_once(self._apply)
        self.merge = _made_once(self._merge)
        self.cast = _made_once(self._cast)
        self.crew = _made_once(self._crew)
        self.read_json = _made_once(self._read_json)
        self.write_json = _made_once(self._write_json)

    def _apply(self, kind: Kind) -> Apply:
        """Return the functions of an apply."""
        module = ir.Module()
        down.Down(self.target, kind).write(_start(module, "down", down.ARGUMENTS))
        outer.Outer(self.target, kind, None).write(_start(module, "outer", outer.ARGUMENTS))
        apply.write_part(_start(module, "part", apply.PART, "f"), self.target)
        apply.write_apply(_start(module, "apply", apply.ARGUMENTS, "f"))
        made = self._compile(module, {"part": (apply.PART, "f"), "apply": (apply.ARGUMENTS, "f")})
        return Apply(made["apply"], made["part"])

    def _crew(self) -> CrewFunctions:
        """Return the functions of threads that share a job out."""
        functions = {
            "share": ("pnp" + "n" * crew.JOB_WORDS, "f"),
            "finish": ("pn", "f"),
            "serve": ("pnnnn", "n"),
        }
        module = ir.Module()
        crew.write_finish(_start(module, "finish", *functions["finish"]))
        crew.write_share(_start(module, "share", *functions["share"]))
        crew.write_serve(_start(module, "serve", *functions["serve"]))
        return CrewFunctions(**self._compile(module, functions))

    def _merge(self, right_kind: Kind, base_kind: Kind) -> Call:
        """Return the function of a merge: `outer.ARGUMENTS`, `base` and `out` of one kind."""
        module = ir.Module()
        outer.Outer(self.target, right_kind, base_kind).write(
            _start(module, "outer", outer.ARGUMENTS)
        )
        return self._compile(module, {"outer": (outer.ARGUMENTS, "")})["outer"]

    def _cast(self, from_kind: Kind, to_kind: Kind) -> Call:
        """Return cast(array, out, n)."""
        module = ir.Module()
        write_cast(_start(module, "cast", "ppn"), self.target, from_kind, to_kind)
        return self._compile(module, {"cast": ("ppn", "")})["cast"]

    def _read_json(self) -> Call:
        """Return find(`read_json.FIND`)."""
        module = ir.Module()
        row = _start(module, "row", read_json.ROW, "n")
        row.function.linkage = "internal"
        read_json.Row(row).write()
        read_json.write_find(_start(module, "find", read_json.FIND, "n"))
        return self._compile(module, {"find": (read_json.FIND, "n")}, level=2)["find"]

    def _write_json(self) -> Call:
        """Return write(`write_json.ARGUMENTS`)."""
        module = ir.Module()
        write_json.Rows(self.target, _start(module, "write", write_json.ARGUMENTS, "n")).write()
        functions = {"write": (write_json.ARGUMENTS, "n")}
        return self._compile(module, functions, level=2)["write"]

    def _compile(
        self, module: ir.Module, functions: Mapping[str, tuple[str, str]], level: int = 0
    ) -> dict[str, Call]:
        compiled = Compiled(str(module), self.target, level)
        made: dict[str, Call] = {}
        for name, (arguments, result) in functions.items():
            prototype = ctypes.CFUNCTYPE(_TYPES[result][1], *(_TYPES[one][1] for one in arguments))
            function = prototype(compiled.address(name))
            function.compiled = compiled  # type: ignore[attr-defined]  # lives as long as it
            made[name] = function
        return made


class Compiled:
    """Functions in memory; they go when this goes.

    `level` is how much LLVM changes them first: 0 for loops that are written out as they are to be
    (2 would take three times as long and gain nothing), 2 where there are variables and branches.
    """

    def __init__(self, text: str, target: Target, level: int) -> None:
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

    def address(self, name: str) -> int:
        """Return where a function is."""
        address: int = self._engine.get_function_address(name)
        return address


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """Return the functions for this machine."""
    return Kernels(host())


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
