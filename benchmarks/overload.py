"""What is left of the service when far too many clients send bodies of 512 KiB at once.

64 connections (as many as there are places) against 1,000, each sending its next request as soon
as the last one is answered. A client that gets 503 comes back after Retry-After and up to half a
second, or at once with `--eager`. Times are the clients', from the whole head, which they have sent
even if the service has not accepted the connection yet, to the last byte of the answer. They are
those of 8 clients in a process of their own, which rest in between and need not wait for the work
of the others. Health is asked every 20 ms on a connection of its own. Server and clients have a core
each. Flags: --seconds, --eager, --json FILE.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

import uvloop
from load import CLIENT_CORE, SERVER_CORE, post
from measure import report
from server import serving

import numpy as np

from bonsai_lora.formats import safetensors

WIDTH, ROWS = 4096, 32
"""32 rows of 4,096 float32: 512 KiB."""
PLACES, MANY, MEASURED, REST_SECONDS = 64, 1000, 8, 0.02
WARM_SECONDS = 1.5
"""All connect at once; what that costs is not counted."""
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
OPTIONS = argparse.ArgumentParser()
OPTIONS.add_argument("--seconds", type=float, default=5)
OPTIONS.add_argument("--eager", action="store_true")


class Load:
    """What all connections have measured since the last `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.served: list[float] = []
        self.refused = 0
        self.broken = 0
        self.health: list[float] = []


class Client(asyncio.BufferedProtocol):
    """A connection that sends a request and counts the bytes of its answer.

    It copies nothing, as what it takes of its core would be counted as the service's time.
    """

    buffer = memoryview(bytearray(1 << 20))

    def connection_made(self, transport) -> None:
        self.transport = transport
        self._answer: asyncio.Future | None = None

    def ask(self, request: bytes) -> asyncio.Future:
        """Send a request; give status, whether the connection goes on, and seconds to wait."""
        self._head, self._missing = b"", -1
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def get_buffer(self, _hint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, count: int) -> None:
        if self._missing < 0:
            self._head += self.buffer[:count]
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._head = head.lower()
            self._missing = int(self._value(b"content-length"))
            count = len(body)
        self._missing -= count
        if self._missing == 0 and not self._answer.done():
            goes_on = b"connection: close" not in self._head
            wait = int(self._value(b"retry-after") or 0)
            self._answer.set_result((int(self._head[9:12]), goes_on, wait))

    def _value(self, name: bytes) -> bytes:
        return self._head.partition(name + b": ")[2].partition(b"\r\n")[0]

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError())


async def connect(address) -> Client:
    return (await asyncio.get_running_loop().create_connection(Client, *address))[1]


async def client(
    address, request: bytes, load: Load, until: float, rest: float, *, eager: bool
) -> None:
    """Ask again and again until `until`, over new connections where the old ones end."""
    connection = None
    while time.perf_counter() < until:
        try:
            if connection is None:
                connection = await connect(address)
            began = time.perf_counter()
            status, goes_on, wait = await connection.ask(request)
        except OSError:
            load.broken += 1
            connection = None
            continue
        if not goes_on:
            connection.transport.close()
            connection = None
        if status == 200:
            load.served.append(time.perf_counter() - began)
            await asyncio.sleep(rest)
        else:
            load.refused += 1
            await asyncio.sleep(0 if eager else wait + random.random() / 2)
    if connection is not None:
        connection.transport.close()


async def probe(address, load: Load, until: float) -> None:
    """Ask for the health every 20 ms."""
    connection = await connect(address)
    while time.perf_counter() < until:
        began = time.perf_counter()
        await connection.ask(HEALTH)
        load.health.append(time.perf_counter() - began)
        await asyncio.sleep(0.02)
    connection.transport.close()


async def measure(
    address, request: bytes, connections: int, seconds: float, *, eager: bool
) -> dict[str, float]:
    load = Load()
    until = time.perf_counter() + WARM_SECONDS + seconds
    rest = REST_SECONDS if connections == MEASURED else 0.0
    clients = [client(address, request, load, until, rest, eager=eager) for _ in range(connections)]
    asyncio.get_running_loop().call_later(WARM_SECONDS, load.reset)
    await asyncio.gather(probe(address, load, until), *clients)
    served, health = sorted(load.served), sorted(load.health)
    return {
        "served a second": len(served) / seconds,
        "refused a second": load.refused / seconds,
        "broken": load.broken,
        "p50, ms": 1000 * served[len(served) // 2],
        "p99, ms": 1000 * served[int(len(served) * 0.99)],
        "p99 of health, ms": 1000 * health[int(len(health) * 0.99)],
    }


def main() -> None:
    options, _ = OPTIONS.parse_known_args()
    if os.environ.get("OVERLOAD"):  # a process of clients
        host, port, path, connections = os.environ["OVERLOAD"].split()
        os.sched_setaffinity(0, {CLIENT_CORE})
        if int(connections) > MEASURED:
            os.nice(5)
        work = measure(
            (host, int(port)),
            Path(path).read_bytes(),
            int(connections),
            options.seconds,
            eager=options.eager,
        )
        print(json.dumps(uvloop.run(work)))
        return
    body = safetensors.encode({"inputs": np.ones((ROWS, WIDTH), np.float32)})
    rows = []
    with (
        serving("--store", "memory:", cores={SERVER_CORE}) as (url, process),
        tempfile.NamedTemporaryFile() as file,
    ):
        for method, path, fields in (
            ("POST", "/v1/sets", {"name": "s", "config": {"rank": 16}}),
            ("PUT", "/v1/sets/s/adapters/m", {"d_in": WIDTH, "d_out": WIDTH}),
        ):
            data = json.dumps(fields).encode()
            headers = {"Content-Type": "application/json"}
            urlopen(Request(url + path, data, headers, method=method), timeout=10).close()
        path = "/v1/sets/s/adapters/m/apply"
        file.write(post(path, body, Content_Type="application/vnd.safetensors"))
        file.flush()
        host, port = url.removeprefix("http://").split(":")
        for connections in (PLACES, MANY) * 2:
            both = [
                subprocess.Popen(
                    [sys.executable, __file__, *sys.argv[1:]],
                    env={**os.environ, "OVERLOAD": f"{host} {port} {file.name} {count}"},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for count in (connections - MEASURED, MEASURED)
            ]
            load, measured = [
                json.loads(one.communicate(timeout=options.seconds + 60)[0].splitlines()[-1])
                for one in both
            ]
            for name in ("served a second", "refused a second", "broken"):
                measured[name] += load[name]
            peak = Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
            rows.append({"connections": connections, **measured, "peak, MB": int(peak) // 1024})
    report("Goodput under overload", rows)


if __name__ == "__main__":
    main()
