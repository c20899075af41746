"""Read files below a folder without following a link out of it."""

import os
from contextlib import ExitStack
from pathlib import Path

from bonsai_lora.errors import SourceRefusedError
from bonsai_lora.sources.origins import Origin
from bonsai_lora.sources.web import Sink, check_length

_PIECE_BYTES = 1 << 20


def read(origin: Origin, path: str, sink: Sink, limit: int) -> None:
    """Give a file to `sink` in pieces, up to `limit` bytes.

    Each part of the path is opened below the one before, and none may be a link. Raises
    SourceRefusedError if it cannot be, BodyTooLargeError.
    """
    *folders, name = path.split("/")
    with ExitStack() as opened:
        try:
            below = _open(origin.folder, None, os.O_DIRECTORY)
            opened.callback(os.close, below)
            for part in folders:
                below = _open(part, below, os.O_DIRECTORY | os.O_NOFOLLOW)
                opened.callback(os.close, below)
            # Without waiting for the writer of a pipe, which is not a file either.
            found = _open(name, below, os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise SourceRefusedError(
                f"the origin {origin.name!r} has no file {name} there ({error.strerror}); use the "
                "path of an adapter",
                origin=origin.name,
            ) from None
        file = opened.enter_context(os.fdopen(found, "rb"))
        if not os.path.isfile(found):  # noqa: PTH113 - of a descriptor
            raise SourceRefusedError(
                f"{name} of the origin {origin.name!r} is not a regular file; use the path of an "
                "adapter",
                origin=origin.name,
            )
        received = 0
        while piece := file.read(_PIECE_BYTES):
            received += len(piece)
            check_length(name, received, limit)
            sink(piece)


def _open(name: str | Path, below: int | None, flags: int) -> int:
    return os.open(name, flags | os.O_RDONLY | os.O_CLOEXEC, dir_fd=below)
