"""Files of bases, read in pieces with preadv(2).

Other programs write these files. Touching a memory map of one that was truncated would end the
process with SIGBUS; a read returns fewer bytes.
"""

import errno
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bonsai_lora.core.cast import Array
from bonsai_lora.core.merge import Block
from bonsai_lora.errors import BaseChangedError, TooManyFilesError, is_out_of_files
from bonsai_lora.formats.identity import Identity, identity_of, is_unsettled
from bonsai_lora.formats.safetensors import as_bytes


class BaseFile:
    """An open file; it is closed when it is garbage-collected. Thread-safe.

    Each read raises BaseChangedError if the file was overwritten or truncated since it was opened,
    so that bytes of two versions never mix. A file that was replaced or removed stays readable.
    """

    def __init__(self, base: str, name: str, path: Path) -> None:
        self._what = f"{name} of base {base!r}"
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._changed("was removed while it was opened") from None
        except OSError as error:
            if is_out_of_files(error):
                raise TooManyFilesError from None
            raise
        status = os.fstat(self._descriptor)
        if is_unsettled(status):  # the checks after each read could miss a change
            raise self._changed("was changed less than two seconds ago")
        self.identity: Identity = identity_of(status)
        self.size_bytes = status.st_size
        self.modified_ns = status.st_mtime_ns
        self._changed_ns = status.st_ctime_ns

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def read(self, start: int, stop: int) -> memoryview:
        """Return a copy of the bytes [start, stop), which must be within the file."""
        buffer = as_bytes(np.empty(stop - start, np.uint8))
        self.read_into(buffer, start)
        return buffer

    def read_at(self, start: int, size: int) -> memoryview:
        """Return `size` bytes from `start`, fewer only at the end of the file."""
        return self.read(start, min(start + size, self.size_bytes))

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start`, which must be within the file."""
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], start + done)
            if count == 0:
                raise self._changed("became shorter while it was read")
            done += count
        self._check_unchanged()

    def _read_some(self, buffer: memoryview, start: int) -> int:
        try:
            return os.preadv(self._descriptor, [buffer], start)
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: the server removed the file
                raise self._changed("was removed while it was read") from None
            raise

    def _check_unchanged(self) -> None:
        # A write changes the times before the bytes, so checking after the read is enough.
        now = os.fstat(self._descriptor)
        is_same = (now.st_size, now.st_mtime_ns) == (self.size_bytes, self.modified_ns)
        # Replacing or removing the file changes only this time, and leaves it without a name.
        is_same = is_same and (now.st_ctime_ns == self._changed_ns or now.st_nlink == 0)
        if not is_same:
            raise self._changed("was overwritten while it was read")

    def _changed(self, what: str) -> BaseChangedError:
        return BaseChangedError(
            f"{self._what} {what}; request it again, and replace files by renaming"
        )


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor of a base, whose values are read block by block."""

    file: BaseFile
    start: int
    """Offset of the first value in the file."""
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def as_matrix(self, rows: int) -> "StoredTensor":
        """Return the same values as a matrix of `rows` rows."""
        return replace(self, shape=(rows, prod(self.shape) // max(rows, 1)))

    def __getitem__(self, block: Block) -> Array:
        """Return a copy of a block of a matrix; raises BaseChangedError."""
        rows, columns = block
        values: Array = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        first = rows.start * self.shape[1] + columns.start
        self.file.read_into(as_bytes(values), self.start + first * self.dtype.itemsize)
        return values
