"""Measure how much of a memory-mapped file is in the page cache (mincore(2))."""

import ctypes
import mmap

import numpy as np


def resident_bytes(mapped: memoryview) -> int:
    """Return how many bytes of a mapped file are in memory, rounded up to whole pages.

    Returns the whole length if the system cannot tell.
    """
    if not mapped:
        return 0
    pages = -(-len(mapped) // mmap.PAGESIZE)
    flags = np.ones(pages, np.uint8)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    if not _mincore(address, len(mapped), flags.ctypes.data):
        flags[:] = 1
    return int((flags & 1).sum()) * mmap.PAGESIZE


def _mincore(address: int, length: int, flags: int) -> bool:
    """Write one byte per page to the address `flags`; return whether that succeeded."""
    try:
        mincore = ctypes.CDLL(None).mincore
    except (AttributeError, OSError, TypeError):  # a C library without it, or none
        return False
    failed = mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(flags))
    return not failed
