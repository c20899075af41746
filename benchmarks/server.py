"""The service as a process, for benchmarks that go over a socket."""

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "bonsai-lora")


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `bonsai-lora serve` on a free port of the loopback; give its URL and process."""
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", *flags], stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr:
            if found := re.search(r"serving on (http://[\d.:]+)", line):
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1], process
    finally:
        process.terminate()
        process.wait(timeout=30)
