"""Memory-mapped files."""

import mmap
import os
from typing import BinaryIO


def map_file(file: BinaryIO) -> memoryview:
    """Return an open file as a read-only memory map; empty for an empty file.

    The view stays valid if the file is closed, replaced or removed, but not if it is truncated.
    """
    if os.fstat(file.fileno()).st_size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
