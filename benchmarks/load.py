"""A load generator: one request over several connections, again and again.

Runs as a process of its own, on a core of its own where there are two. Prints JSON: requests per
second, and the median and 99th percentile of their latency.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

Address = tuple[str, int]

CONNECTIONS = 8
SERVER_CORE, CLIENT_CORE = 0, (os.cpu_count() or 1) - 1


def run_load(
    address: Address, request: bytes, seconds: float, *, connections: int = CONNECTIONS
) -> dict[str, float]:
    """Return what a process of `load.py` measures; raises RuntimeError where an answer is no 200."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(request)
        file.flush()
        command = [sys.executable, __file__, address[0], str(address[1]), file.name]
        done = subprocess.run(
            [*command, str(seconds), str(connections)],
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def post(path: str, body: bytes, **headers: str) -> bytes:
    """Return the bytes of a POST request."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


class _Connection(asyncio.Protocol):
    """Sends the request, takes the answer, and begins again until the end."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self._request = request
        self._latencies = latencies
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stopping = False

    def connection_made(self, transport) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._missing = -1
        self._head = b""
        self._started = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            head, separator, rest = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self.done.set_exception(RuntimeError(self._head[:500].decode()))
                self._transport.close()
                return
            length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            self._missing = int(length) - len(rest)
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._latencies.append(time.perf_counter() - self._started)
            if self.stopping:
                self.done.set_result(None)
                self._transport.close()
            else:
                self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or RuntimeError("the server closed the connection"))


async def _measure(host: str, port: int, request: bytes, seconds: float, connections: int):
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    some = [
        (await loop.create_connection(lambda: _Connection(request, latencies), host, port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(min(0.3, seconds / 5))  # to warm up
    latencies.clear()
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    elapsed, count = time.perf_counter() - started, len(latencies)
    measured = sorted(latencies)
    for one in some:
        one.stopping = True
    await asyncio.gather(*(one.done for one in some))
    return {
        "rps": count / elapsed,
        "p50_ms": 1000 * measured[len(measured) // 2],
        "p99_ms": 1000 * measured[int(len(measured) * 0.99)],
    }


def main() -> None:
    host, port, path, seconds, connections = sys.argv[1:]
    os.sched_setaffinity(0, {CLIENT_CORE})
    request = Path(path).read_bytes()
    measure = _measure(host, int(port), request, float(seconds), int(connections))
    print(json.dumps(uvloop.run(measure)))


if __name__ == "__main__":
    main()
