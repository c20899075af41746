"""Everything at once against a running service: kills, mutated requests, overload, and honest users.

`make soak SECONDS=600` runs it. Users create, replace and delete sets and apply them, and know what
every answer has to be. Meanwhile workers are killed, requests are mutated in every way, and 200
connections send bodies of 512 KiB at once. At the end the service is killed and started again, and
every set that was acknowledged must be there, to the bit. Where SeaweedFS is installed, half of the
time goes to two services over a bucket (`soak_bucket.py`). Prints what it counted; exits with 1 if
anything was wrong.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from soaking import BINARY, BUSY, KILL_SECONDS, USERS, WIDTH, Service, Soak

from bonsai_lora.formats import safetensors

sys.path.append(str(Path(__file__).parent.parent / "cluster"))

CROWD = 200


class FolderSoak(Soak):
    """One service over a folder, and everything at once against it."""

    def __init__(self, service: Service, seconds: float, seed: int) -> None:
        super().__init__([service], seconds, seed)
        self.service = service
        self.health: list[float] = []

    def mutate(self, rng: random.Random, _number: int) -> None:
        """Send a request with random changes, and expect an answer without a server's fault."""
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.service.port), timeout=10) as connection,
        ):
            connection.sendall(mutated(rng))
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(1 << 16):
                answer += part
            self.counts["mutated requests"] += 1
            for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer):
                if status[:1] == b"5" and int(status) not in (*BUSY, 501):
                    self.wrong.append(f"mutated request: {answer[:300]!r}")

    def crowd(self, _rng: random.Random, _number: int) -> None:
        """Send bodies of 512 KiB over many connections at once."""
        length = 512 << 10
        head = "POST /v1/sets/user0.0/apply?module=x HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: {BINARY['Content-Type']}\r\nContent-Length: {length}\r\n\r\n"
        request = head.encode() + bytes(length)
        with contextlib.ExitStack() as stack:
            connections = []
            for _ in range(CROWD):
                with contextlib.suppress(OSError):
                    made = socket.create_connection(("127.0.0.1", self.service.port), timeout=10)
                    connections.append(stack.enter_context(made))
            for one in connections:
                with contextlib.suppress(OSError):
                    one.setblocking(False)
                    one.send(request)
            time.sleep(0.3)
            for one in connections:
                with contextlib.suppress(OSError):
                    one.settimeout(0.01)
                    answer = one.recv(4096)
                    if answer.startswith(b"HTTP/1.1 503"):
                        self.counts["refused in a crowd"] += 1
        time.sleep(1)

    def probe(self, _rng: random.Random, _number: int) -> None:
        """Run a process that asks for the health; the threads of this one wait for each other."""
        left = self.until - time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, "--probe", str(self.service.port), "--seconds", str(left)],
            capture_output=True,
            text=True,
            timeout=left + 60,
            check=True,
        )
        self.health += json.loads(done.stdout)

    def kill(self, rng: random.Random, _number: int) -> None:
        """Kill a worker every few seconds."""
        time.sleep(min(KILL_SECONDS, max(0.0, self.until - time.monotonic())))
        if time.monotonic() < self.until:
            self.counts["workers killed"] += self.service.kill_a_worker(rng)


PATHS = [
    "/v1/sets", "/v1/sets/user0.0", "/v1/sets/user0.0/apply", "/v1/apply", "/v1/stats", "/healthz",
    "/v1/sets/user0.0/adapters/layers.0.self_attn.q_proj/apply", "/v2/models/user0.0/infer",
    "/v1/sets/user0.0/adapters/layers.0.self_attn.q_proj/merge?dtype=F32", "/metrics", "/v1/bases",
    "/v1/sets/user0.0/adapter_model.safetensors", "/v2/repository/index", "/v1/estimate",
]  # fmt: skip
BODIES = [
    b'{"inputs": [[1, 2], [3, 4]]}',
    b'{"name": "mutant", "config": {"rank": 4}, "mlp": {"hidden_size": 8, "intermediate_size": 8}}',
    b'{"module": "m", "sets": ["user0.0", null], "inputs": [[1], [2]]}',
    b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
    safetensors.encode({"inputs": np.ones((2, WIDTH), np.float32)}),
    bytes(4096),
    b"[" * 5000,
]  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """Return a request with some bytes changed, cut out, repeated or moved."""
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "X"])
    body = bytearray(rng.choice(BODIES))
    if method == "DELETE":
        method = "POST"  # only users delete, who know about it
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(body))
        change = rng.randrange(3)
        if change == 0:
            body[place] = rng.randrange(256)
        elif change == 1:
            del body[place : place + rng.randrange(1, 9)]
        else:
            body[place:place] = body[place : place + 9] * rng.randrange(1, 9)
        body = body or bytearray(b"x")
    media = rng.choice(["application/json", BINARY["Content-Type"], "text/x", ""])
    path = rng.choice(PATHS)
    if method == "PUT" and path == "/v1/sets/user0.0":
        path = "/v1/sets/mutant"
    length = len(body) if rng.random() < 0.9 else rng.randrange(100_000)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media}\r\n"
    head = bytearray(f"{head}Content-Length: {length}\r\nConnection: close\r\n\r\n".encode())
    if rng.random() < 0.2:
        head[rng.randrange(len(head))] = rng.randrange(256)
    return bytes(head + body)


def probe(port: int, seconds: float) -> list[float]:
    """Ask for the health every 20 ms; return how long each answer took, in seconds.

    If the worker of the connection is killed, that is the time until another one answers.
    """
    until, times = time.perf_counter() + seconds, []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    while time.perf_counter() < until:
        began = time.perf_counter()
        while True:
            try:
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                break
            except (OSError, http.client.HTTPException):
                connection.close()
        times.append(time.perf_counter() - began)
        time.sleep(0.02)
    return times


def soak(seconds: float, seed: int) -> list[tuple[str, object]]:
    """Run everything over a folder; return figures, the last of which is what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service("--store", str(Path(folder) / "store"))
        run = FolderSoak(service, seconds, seed)
        try:
            run.run(*[run.use] * USERS, run.mutate, run.crowd, run.probe, run.kill)
            service.kill()
            service.start()
            with httpx.Client(base_url=service.url, timeout=30) as client:
                run.check_sets(client)
        finally:
            code = service.stop()
    if code:
        run.wrong.append(f"the service exited with {code}")
    health = sorted(run.health) or [0.0]
    return [
        ("seconds", seconds),
        *sorted(run.counts.items()),
        ("health, p50 ms", round(1000 * health[len(health) // 2], 1)),
        ("health, p99 ms", round(1000 * health[int(len(health) * 0.99)], 1)),
        ("wrong", run.wrong),
    ]


def parts() -> dict[str, Callable[[float, int], list[tuple[str, object]]]]:
    """Return what to run by name; says what is left out."""
    from seaweed import WEED

    if WEED is None:
        print("left out: two services over a bucket, as SeaweedFS is missing; make test-cluster")
        return {"a folder": soak}
    from soak_bucket import soak_bucket

    return {"a folder": soak, "a bucket": soak_bucket}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--probe", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe(options.probe, options.seconds)))
        return 0
    print(f"seed {options.seed}")
    failed, chosen = 0, parts()
    for store, run in chosen.items():
        figures = run(options.seconds / len(chosen), options.seed)
        print(f"over {store}")
        for name, value in figures[:-1]:
            print(f"| {name} | {value} |")
        for one in itertools.islice(figures[-1][1], 50):
            print("WRONG", one)
        failed |= bool(figures[-1][1])
    return failed


if __name__ == "__main__":
    sys.exit(main())
