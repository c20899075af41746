"""The CPU that code is generated for."""

import ctypes
import mmap
import os
import platform
from functools import lru_cache
from typing import NamedTuple

import llvmlite.binding as llvm

MACHINE = platform.machine().lower()


class Target(NamedTuple):
    """A CPU, described by what the generators need."""

    cpu: str
    features: str
    lanes: int
    """float32 numbers in a vector register."""
    sums: int
    """Registers available for the sums of a product: three quarters of all."""
    has_half: bool
    """Whether the CPU converts float16."""

    def vectors_of(self, height: int) -> int:
        """Return how many vectors of sums each row of a tile may have: 8, 4, 2 or 1."""
        width = 8
        while width > 1 and width * height > self.sums:
            width //= 2
        return width


@lru_cache(maxsize=1)
def host() -> Target:
    """Return the target for this machine."""
    features = llvm.get_host_cpu_features()
    cpu, names = llvm.get_host_cpu_name(), features.flatten()
    if MACHINE not in ("x86_64", "amd64"):
        return Target(cpu, names, lanes=4, sums=24, has_half=True)
    if features.get("avx512f") and features.get("avx512vl"):
        lanes, sums = 16, 24
    else:
        lanes, sums = (8 if features.get("avx2") else 4), 12
    return Target(cpu, names, lanes, sums, has_half=bool(features.get("f16c")))


def may_run_new_code() -> bool:
    """Return whether written memory may be executed; hardened systems can forbid it."""
    if os.name != "posix":
        return True
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        first = ctypes.c_char.from_buffer(page)
        place = ctypes.c_void_p(ctypes.addressof(first))
        mprotect = ctypes.CDLL(None).mprotect
        allowed: bool = mprotect(place, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) == 0
        del first
        return allowed
