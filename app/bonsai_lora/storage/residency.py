"""How much of a mapped file is in memory (mincore(2))."""

import ctypes
import mmap

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def resident_bytes(mapped: memoryview) -> int:
    """Return how many bytes of a whole mapped file are in memory, in whole pages."""
    if not mapped:
        return 0
    pages = -(-len(mapped) // mmap.PAGESIZE)
    flags = np.zeros(pages, np.uint8)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    failed = _libc.mincore(
        ctypes.c_void_p(address),
        ctypes.c_size_t(len(mapped)),
        flags.ctypes.data_as(ctypes.c_char_p),
    )
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return int((flags & 1).sum()) * mmap.PAGESIZE
