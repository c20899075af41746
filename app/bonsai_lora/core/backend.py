"""Choose what computes: the kernels if they can run, otherwise the definition in NumPy.

The choice is made once per process, by `choose` or when the first number is computed. The
functions below are those of `definition`, which documents them. If a kernel does not support an
input (float64, a memory layout that it cannot read), the definition computes it, to the same bits.
"""

import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from bonsai_lora.core import definition
from bonsai_lora.core.definition import Array, Floats, NumberList

if TYPE_CHECKING:
    from bonsai_lora.kernels.arrays import ArrayKernels

Setting = Literal["auto", "off"]

Apply = Callable[[Array, Floats], Floats]
"""x (n, d_in), factors (1,) or (n,) -> (n, d_out): `definition.apply` for one A and B."""

_lock = threading.Lock()
_chosen: "tuple[ArrayKernels | None, str] | None" = None


def choose(setting: Setting = "auto") -> str:
    """Choose for this process; return "" if the kernels run, otherwise why they do not.

    Raises RuntimeError if `setting` is "off" but the kernels are in use: the last bits of an answer
    must not change while a process lives.
    """
    global _chosen  # noqa: PLW0603 - a process has one backend
    with _lock:
        if _chosen is None:
            _chosen = _find(setting)
        kernels, reason = _chosen
        if setting == "off" and kernels is not None:
            raise RuntimeError("the kernels are in use already; choose before the first apply")
        return reason


def running() -> "ArrayKernels | None":
    """Return the kernels of this process, or None if the definition computes."""
    if _chosen is None:
        choose()
    assert _chosen is not None
    return _chosen[0]


def prepare() -> None:
    """Compile what applies need, for all dtypes and JSON, which takes about 0.7 s of CPU.

    Merges are compiled on first use.
    """
    kernels = running()
    if kernels is not None:
        kernels.prepare()


def make_apply(a_matrix: Array, b_matrix: Array) -> Apply:
    """Return `definition.apply` for this A (r, d_in) and B (d_out, r)."""
    kernels = running()
    made = None if kernels is None else kernels.make_apply(a_matrix, b_matrix)
    return partial(definition.apply, a_matrix, b_matrix) if made is None else made


def merge(base: Array, left: Floats, right: Array, factor: float, out: Array) -> None:
    """Write base + factor * left @ right to `out`."""
    kernels = running()
    if kernels is None or not kernels.merge(base, left, right, factor, out):
        definition.merge(base, left, right, factor, out)


def cast(array: Array, out: Array) -> None:
    """Write `array` to `out`, rounded to nearest even."""
    kernels = running()
    if kernels is None or not kernels.cast(array, out):
        definition.cast(array, out)


def find_lists(text: bytes | memoryview, least: int) -> list[NumberList]:
    """Return lists of at least `least` numbers in JSON text, in order; some may be left out.

    The text around a list is not parsed, so a list may turn out to be part of a string. Numbers
    beyond float32 become infinite.
    """
    kernels = running()
    if kernels is None:
        return definition.find_lists(text, least)
    return [NumberList(*found) for found in kernels.find_lists(text, least)]


def list_of(array: Floats) -> memoryview:
    """Return a float32 array (n,) or (rows, n), all finite, as a JSON list."""
    kernels = running()
    text = None if kernels is None else kernels.list_of(array)
    return definition.list_of(array) if text is None else text


def _find(setting: Setting) -> "tuple[ArrayKernels | None, str]":
    """Return the kernels and "", or None and the reason."""
    if setting == "off":
        return None, "switched off"
    try:
        arrays = import_module("bonsai_lora.kernels.arrays")
        target = import_module("bonsai_lora.kernels.target")
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    if not target.may_run_new_code():
        return None, "this system forbids memory to become executable"
    return arrays.ArrayKernels(target.host()), ""
