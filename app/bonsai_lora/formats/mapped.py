"""Files as memory."""

import mmap
import os
from typing import BinaryIO


def map_file(file: BinaryIO) -> memoryview:
    """Return the whole of an open file as read-only memory; empty for an empty file.

    The view stays good when the file is closed, replaced or removed, but not when it is cut.
    """
    if os.fstat(file.fileno()).st_size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
