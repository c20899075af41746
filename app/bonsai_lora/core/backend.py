"""Which code computes: the kernels where they can run, else the definition.

Chosen once per process, when the first number is computed or by `choose`. The functions below are
those of `definition`, which says what they do. What a kernel does not take (float64, a layout that
it cannot read) the definition computes, to the same bits.
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
    """Choose for this process; return "" where the kernels run, else why they do not.

    Raises RuntimeError where the other was chosen before: answers may not change their last bits
    while a process lives.
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
    """Return the kernels of this process, None where the definition computes."""
    if _chosen is None:
        choose()
    assert _chosen is not None
    return _chosen[0]


def prepare() -> None:
    """Compile what applies need, of all dtypes and in JSON: about 0.7 s of CPU in all.

    Merges are compiled when they are first used.
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
    """Return lists of at least so many numbers in JSON text, in order, which need not be all.

    One may stand in a string: what is around them is not looked at. Numbers beyond float32 become
    infinite.
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
    """Return the kernels, or None and why."""
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
