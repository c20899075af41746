"""A network of this process's own: what listens in it is reachable from nowhere else."""

import contextlib
import ctypes
import os
import subprocess

CLONE_NEWNET = 0x40000000
ADDRESS = "10.99.0.1"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(code):
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def own_network():
    """Move this thread, and what it starts, into a new network namespace with `ADDRESS` in it.

    The namespace goes with its last process. Raises OSError where this is not allowed.
    """
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        _check(_libc.unshare(CLONE_NEWNET))
        try:
            for command in (
                "ip link set lo up",
                f"ip address add {ADDRESS}/32 dev lo",
                "ip route add default dev lo",  # Ray looks up its own address by a route
            ):
                subprocess.run(command.split(), check=True)
            yield
        finally:
            _check(_libc.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)
