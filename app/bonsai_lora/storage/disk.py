"""Durable changes of folders, and the errors of a disk as errors of the API."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from bonsai_lora.errors import (
    StoreFullError,
    StoreReadOnlyError,
    TooManyFilesError,
    is_out_of_files,
)


@contextlib.contextmanager
def synced(folder: Path) -> Iterator[None]:
    """Make changes in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn OSErrors of a full, read-only or overloaded system into errors of the API."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFullError(
                "the disk of the store is full and nothing was changed; delete sets, or enlarge "
                "the disk"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreReadOnlyError(
                "the store is read-only and nothing was changed; give the service write access to "
                "its folder"
            ) from error
        if is_out_of_files(error):
            raise TooManyFilesError from error
        raise
