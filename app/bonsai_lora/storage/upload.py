"""Receive a safetensors file in pieces and turn it into a set's file without a second copy."""

import hashlib
import os
from dataclasses import dataclass, replace
from typing import BinaryIO

from bonsai_lora.core.cast import Array
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.foreign import START_BYTES, check_start
from bonsai_lora.formats.mapped import map_file

_ALIGNMENT = 4096


@dataclass(frozen=True, eq=False, slots=True)
class ReceivedUpload:
    """A complete upload; `file` has its tensor data, but no header yet."""

    file: BinaryIO
    header: safetensors.Header
    """The upload's header; `data_start` is the offset of the data in `file`."""
    tensors: dict[str, Array]
    """Views of the memory-mapped file, by the upload's tensor names."""
    digest: str
    """SHA-256 of the data, in hexadecimal."""

    def write_header(self, header: bytes) -> None:
        """Write the final header, which must exactly fill the space before the data."""
        assert len(header) == self.header.data_start
        os.pwrite(self.file.fileno(), header, 0)


class WholeUpload:
    """Receives the pieces of a file that is written to `file` as it is, to be converted later."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, piece: bytes | bytearray) -> None:
        """Write the next piece."""
        self._file.write(piece)

    def finish(self) -> memoryview:
        """Return the complete file, memory-mapped."""
        self._file.flush()
        return map_file(self._file)


class HashedUpload(WholeUpload):
    """Receives a file that is written as it is, and computes its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """SHA-256 of what was received so far, in hexadecimal."""
        return self._digest.hexdigest()

    def write(self, piece: bytes | bytearray) -> None:
        """Write the next piece."""
        super().write(piece)
        self._digest.update(piece)


class Upload:
    """Receives the pieces of a safetensors file and writes its data to `file` as they arrive.

    The upload's header is kept in memory. Space is reserved before the data for the set's header,
    which has the same tensors plus the set's metadata.
    """

    def __init__(self, file: BinaryIO, max_header_bytes: int) -> None:
        self._file = file
        self._limit = max_header_bytes
        self._start: bytearray | None = bytearray()
        self._head = bytearray()
        self._missing = 8
        self._data_start = 0
        self._digest = hashlib.sha256()
        self._received = 0

    def write(self, piece: bytes | bytearray) -> None:
        """Write the next piece.

        Raises HeaderTooLargeError, MalformedSafetensorsError, and the errors of `check_start`.
        """
        if self._start is None:
            self._write(piece)
            return
        self._start += piece
        if len(self._start) >= START_BYTES:
            self._begin()

    def _begin(self) -> None:
        """Check and write the start, once enough of it is known whatever the size of the pieces."""
        start, self._start = self._start, None
        if start is not None:
            check_start(start)
            self._write(start)

    def _write(self, piece: bytes | bytearray) -> None:
        self._received += len(piece)
        rest = memoryview(piece)
        while self._missing and rest:
            taken = rest[: self._missing]
            self._head += taken
            self._missing -= len(taken)
            rest = rest[len(taken) :]
            if not self._missing and len(self._head) == 8:
                self._missing = safetensors.header_length(bytes(self._head), self._limit)
            if not self._missing:
                # If the space turns out too small, the whole set is written again instead.
                room = min(2 * len(self._head) + (1 << 16), safetensors.MAX_HEADER_BYTES)
                self._data_start = room // _ALIGNMENT * _ALIGNMENT
                self._file.seek(self._data_start)
        if rest:
            self._file.write(rest)
            self._digest.update(rest)

    def count_tensors(self) -> int:
        """Return how many tensors the header has at most; cheap, before it is parsed.

        Raises the errors of `write` if the file is short.
        """
        self._begin()
        return self._head.count(b'"data_offsets"')

    def finish(self) -> ReceivedUpload:
        """Return the complete upload.

        Raises the errors of `write`, MalformedSafetensorsError unless it is exactly one file,
        InvalidRequestError for tensors of an unsupported dtype.
        """
        self._begin()
        self._file.flush()
        header = safetensors.decode_header(bytes(self._head), limit=self._limit)
        safetensors.check_total(header, self._received)
        moved = replace(header, data_start=self._data_start)
        has_data = header.total_bytes > header.data_start
        # Tensors without elements leave nothing to map: they are views of the room for the header.
        mapped = map_file(self._file) if has_data else memoryview(bytes(moved.data_start))
        tensors = {name: safetensors.view(mapped, moved, name) for name in moved.tensors}
        return ReceivedUpload(self._file, moved, tensors, self._digest.hexdigest())
