"""Verify that the tensors of sets are those that were written."""

import _thread
import errno
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from bonsai_lora.errors import BonsaiLoraError, MalformedSafetensorsError
from bonsai_lora.storage.setfile import SetRecord, record_of

OnPiece = Callable[[int], None]
"""Called with the length in bytes of each piece that was read."""

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_BYTES_PER_SECOND = 100e6
"""Rate of the background, about a tenth of what a core can hash."""


def verify_set_file(path: Path, on_piece: OnPiece | None = None) -> SetRecord:
    """Read the whole file of a set and return its record.

    Raises the errors of `read_record`, and MalformedSafetensorsError if the digest of the data is
    not that of the record, or the data cannot be read.
    """
    with path.open("rb") as file:
        record = record_of(path, file)
        digest = hashlib.sha256()
        try:
            file.seek(-record.data_bytes, os.SEEK_END)
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                if on_piece is not None:
                    on_piece(len(piece))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise MalformedSafetensorsError(f"{path.name} cannot be read: {error}") from None
    if record.digest not in (None, digest.hexdigest()):
        raise MalformedSafetensorsError(
            f"{path.name} is damaged: the SHA-256 of its tensors is {digest.hexdigest()}, but "
            f"{record.digest} was written"
        )
    return record


class BackgroundCheck:
    """Calls `verify` with the name of each set that is added, in a thread and at a bounded rate.

    A set is verified once per version. The thread ends when nothing is left to do.
    """

    def __init__(self, verify: Callable[[str, OnPiece], object]) -> None:
        self._verify = verify
        self._waiting: deque[str] = deque()
        self._known: dict[str, str] = {}
        """ETag by name of what was added."""
        self._lock = threading.Lock()
        self._is_running = False

    def add(self, record: SetRecord) -> None:
        """Verify a set soon, if its record has a digest."""
        with self._lock:
            if record.digest is None or self._known.get(record.name) == record.etag:
                return
            self._known[record.name] = record.etag
            self._waiting.append(record.name)
            if not self._is_running:
                self._is_running = True
                # Thread.start waits until it runs: 70 ms of the event loop on a busy machine.
                _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                name = self._waiting.popleft()
            try:
                self._verify(name, _pause)
            except BonsaiLoraError:
                continue  # the store logs what it moves aside
            except Exception:  # noqa: BLE001 - the others are still to be verified
                _log.exception("set %r could not be verified", name)


def _pause(size_bytes: int) -> None:
    time.sleep(size_bytes / _BYTES_PER_SECOND)
