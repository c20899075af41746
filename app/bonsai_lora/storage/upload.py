"""A safetensors file that arrives in pieces and becomes a set's file without a second copy."""

import os
from dataclasses import dataclass, replace
from typing import BinaryIO

from bonsai_lora.core.cast import Array
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.mapped import map_file

_ALIGNMENT = 4096


@dataclass(frozen=True, eq=False, slots=True)
class Arrived:
    """An upload that is complete: where its tensors lie in `file`, which has no header yet."""

    file: BinaryIO
    header: safetensors.Header
    """The upload's header; `data_start` is where the data lies in `file`."""
    tensors: dict[str, Array]
    """Views of the mapped file, by the upload's names."""

    def write_header(self, header: bytes) -> None:
        """Write the final header, as long as the room before the data."""
        assert len(header) == self.header.data_start
        os.pwrite(self.file.fileno(), header, 0)


class Upload:
    """Takes the pieces of a safetensors file and writes its data to `file` as they come.

    The header that came is kept in memory. Before the data, room is left for the set's own header,
    which has the same tensors and the set's metadata besides.
    """

    def __init__(self, file: BinaryIO, max_header_bytes: int) -> None:
        self._file = file
        self._limit = max_header_bytes
        self._head = bytearray()
        self._missing = 8
        self._data_start = 0
        self.received = 0
        """Bytes of the upload so far."""

    def write(self, piece: bytes | bytearray) -> None:
        """Take the next piece; raises HeaderTooLargeError, MalformedSafetensorsError."""
        self.received += len(piece)
        rest = memoryview(piece)
        while self._missing and rest:
            taken = rest[: self._missing]
            self._head += taken
            self._missing -= len(taken)
            rest = rest[len(taken) :]
            if not self._missing and len(self._head) == 8:
                self._missing = safetensors.header_length(bytes(self._head), self._limit)
            if not self._missing:
                # Where that is not enough, the set is written anew instead.
                room = min(2 * len(self._head) + (1 << 16), safetensors.MAX_HEADER_BYTES)
                self._data_start = room // _ALIGNMENT * _ALIGNMENT
                self._file.seek(self._data_start)
        if rest:
            self._file.write(rest)

    def finish(self) -> Arrived:
        """Return what has arrived.

        Raises MalformedSafetensorsError unless it is one whole file, InvalidRequestError for
        tensors of a dtype that is not computed with here.
        """
        self._file.flush()
        header = safetensors.decode_header(bytes(self._head), limit=self._limit)
        safetensors.check_total(header, self.received)
        moved = replace(header, data_start=self._data_start)
        has_data = header.total_bytes > header.data_start
        # Tensors without numbers leave nothing to map; they are views of the room for the header.
        mapped = map_file(self._file) if has_data else memoryview(bytes(moved.data_start))
        tensors = {name: safetensors.view(mapped, moved, name) for name in moved.tensors}
        return Arrived(self._file, moved, tensors)
