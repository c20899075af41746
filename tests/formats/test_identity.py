"""What tells two versions of a file apart."""

import os
import time

from bonsai_lora.formats.identity import identity_of


def status(changed_ns, modified_ns=None, size=10):
    modified_ns = changed_ns if modified_ns is None else modified_ns
    times = (0, modified_ns // 10**9, changed_ns // 10**9)
    exact = {"st_mtime_ns": modified_ns, "st_ctime_ns": changed_ns}
    return os.stat_result((0o100644, 7, 1, 1, 0, 0, size, *times), exact)


def test_each_time_and_the_size_count():
    old = 1_700_000_000_123_456_789
    assert identity_of(status(old)) == identity_of(status(old))
    others = [status(old + 1, old), status(old, old + 1), status(old, size=11)]
    assert all(identity_of(one) != identity_of(status(old)) for one in others)


def test_whole_seconds_are_not_trusted_while_the_file_is_young():
    now = time.time_ns()
    whole = now // 10**9 * 10**9
    assert identity_of(status(whole)) != identity_of(status(whole))
    settled = whole - 3 * 10**9
    assert identity_of(status(settled)) == identity_of(status(settled))
    exact = whole - 1  # a file system with exact times, however young the file is
    assert identity_of(status(exact)) == identity_of(status(exact))
    # Times that an archive set: the change of the file itself is exact.
    assert identity_of(status(exact, settled)) == identity_of(status(exact, settled))
