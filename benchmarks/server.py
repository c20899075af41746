"""The service, and its rivals, as processes: for benchmarks that go over a socket."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

COMMAND = str(Path(sys.executable).parent / "bonsai-lora")

Address = tuple[str, int]


@contextlib.contextmanager
def serving(
    *flags: str, cores: set[int] | None = None, **variables: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `bonsai-lora serve` on a free port of the loopback; give its URL and process."""
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
        preexec_fn=_pin(cores),
    )
    try:
        for line in process.stderr:
            if found := re.search(r"serving on (http://[\d.:]+)", line):
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1], process
    finally:
        _end(process)


@contextlib.contextmanager
def running(
    command: list[str], ready: str, port: int, *, cores: set[int], folder: Path, **variables: str
) -> Iterator[Address]:
    """Run a rival on `port` of the loopback until it answers at the path `ready`."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **variables},
        cwd=folder,
        preexec_fn=_pin(cores),
    )
    try:
        _wait(port, ready, process)
        yield "127.0.0.1", port
    finally:
        _end(process)


def worker_of(service: subprocess.Popen) -> int:
    """Return the process id of a service's only worker."""
    return int(Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text())


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(port: int, path: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if not path:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            urlopen(f"http://127.0.0.1:{port}{path}", timeout=1).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args} did not start")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=30)


def _pin(cores: set[int] | None):
    return None if cores is None else lambda: os.sched_setaffinity(0, cores)
