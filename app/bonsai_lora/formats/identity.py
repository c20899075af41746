"""Tell versions of a file apart without reading it."""

import itertools
import os
import time

Identity = tuple[int, ...]
"""Inode, times of modification and change in nanoseconds, length in bytes; see `identity_of`."""

SETTLE_NANOSECONDS = 2_000_000_000

_SECOND = 1_000_000_000
_numbers = itertools.count()


def identity_of(status: os.stat_result) -> Identity:
    """Return what changes when the file's content changes.

    Some file systems keep whole seconds, in which a file can change twice. There the identity of a
    file that is younger than two seconds equals no other, so that it is read again.
    """
    identity = status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
    return (*identity, next(_numbers)) if is_unsettled(status) else identity


def is_unsettled(status: os.stat_result) -> bool:
    """Return whether the file could change again without a change of its times."""
    changed = status.st_ctime_ns
    is_whole = changed % _SECOND == 0 and status.st_mtime_ns % _SECOND == 0
    return is_whole and time.time_ns() - changed < SETTLE_NANOSECONDS
