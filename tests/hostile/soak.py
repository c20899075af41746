"""Everything at once against a running service: kills, mutated requests, overload, and honest users.

`make soak SECONDS=600` runs it. Users create, replace and delete sets and apply them, and know what
every answer has to be. Meanwhile workers are killed, requests are mutated in every way, and 200
connections send bodies of 512 KiB at once. At the end the service is killed and started again, and
every set that was acknowledged must be there, to the bit. Prints what it counted; exits with 1 if
anything was wrong.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from bonsai_lora.formats import safetensors

COMMAND = str(Path(sys.executable).parent / "bonsai-lora")
BINARY = {"Content-Type": "application/vnd.safetensors"}
WIDTH, RANK, USERS, CROWD = 256, 4, 3, 200
BUSY = (429, 503, 507)
KILL_SECONDS = 2.5


class Service:
    """The command that serves, restarted on demand."""

    def __init__(self, store: Path) -> None:
        self._store = store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        flags = ["--port", str(self.port), "--store", str(self._store), "--workers", "2"]
        self.process = subprocess.Popen(
            [COMMAND, "serve", *flags, "--stall-seconds", "5"], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError("the service did not start")

    def workers(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.process.pid:
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        workers = self.workers()
        self.process.kill()
        self.process.wait(30)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


class Soak:
    """The threads, what they count, and what they found wrong."""

    def __init__(self, service: Service, seconds: float, seed: int) -> None:
        self.service = service
        self.until = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.health: list[float] = []
        self.sets: dict[str, np.ndarray | None] = {}
        """The B that each acknowledged set has; None once it is deleted."""
        self.unknown: set[str] = set()
        """Sets whose last change was neither acknowledged nor refused."""
        self._seed = seed

    def run(self) -> None:
        jobs = [(self.use, number) for number in range(USERS)]
        jobs += [(self.mutate, 0), (self.crowd, 0), (self.probe, 0), (self.kill, 0)]
        threads = [
            threading.Thread(target=self._guard, args=(job, random.Random(self._seed + 10 * n), n))
            for n, (job, _) in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _guard(self, job, rng, number) -> None:
        while time.monotonic() < self.until:
            try:
                job(rng, number)
            except Exception as error:  # noqa: BLE001 - it is reported
                self.wrong.append(f"{job.__name__}: {error!r}")
                return

    def use(self, rng: random.Random, number: int) -> None:
        """Change or apply one of this user's sets, and check the answer to the bit."""
        name = f"user{number}.{rng.randrange(8)}"
        choice = rng.random()
        with httpx.Client(base_url=self.service.url, timeout=30) as client:
            if choice < 0.2:
                self.upload(client, name, rng)
            elif choice < 0.25:
                self.delete(client, name)
            else:
                for _ in range(20):
                    self.apply(client, name, rng)

    def upload(self, client, name: str, rng: random.Random) -> None:
        b_matrix = np.random.default_rng(rng.randrange(1 << 30)).integers(-8, 8, (WIDTH, RANK))
        b_matrix = b_matrix.astype(np.float32)
        key = "base_model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{key}.lora_A.weight": np.eye(RANK, WIDTH, dtype=np.float32),
            f"{key}.lora_B.weight": b_matrix,
        }
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
        files = {
            "adapter_config": json.dumps(config).encode(),
            "adapter_model": safetensors.encode(tensors),
        }
        self.change(name, b_matrix, lambda: client.put(f"/v1/sets/{name}", files=files), (200, 201))

    def delete(self, client, name: str) -> None:
        self.change(name, None, lambda: client.delete(f"/v1/sets/{name}"), (204, 404))

    def change(self, name: str, value, send, good) -> None:
        try:
            answer = send()
        except httpx.HTTPError:
            self.counts["changes cut off by a kill"] += 1
            self.unknown.add(name)
            return
        if answer.status_code in good:
            self.sets[name] = value
            self.unknown.discard(name)
            self.counts["changes acknowledged"] += 1
        elif answer.status_code in BUSY:
            self.counts["changes refused as busy"] += 1
        else:
            self.wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}")

    def apply(self, client, name: str, rng: random.Random) -> None:
        if name in self.unknown:
            return
        expected = self.sets.get(name)
        x = np.zeros((1, WIDTH), np.float32)
        x[0, :RANK] = [rng.randrange(-8, 8) for _ in range(RANK)]
        path = f"/v1/sets/{name}/adapters/layers.0.self_attn.q_proj/apply"
        body = safetensors.encode({"inputs": x})
        try:
            answer = client.post(path, content=body, headers=BINARY)
        except httpx.HTTPError:
            self.counts["applies cut off by a kill"] += 1
            return
        if answer.status_code in BUSY:
            self.counts["applies refused as busy"] += 1
        elif expected is None:
            if answer.status_code != 404:
                self.wrong.append(f"apply of {name}, which is gone: {answer.status_code}")
        elif answer.status_code != 200:
            self.wrong.append(f"apply of {name}: {answer.status_code} {answer.text[:200]}")
        else:
            outputs = safetensors.decode(answer.content)[0]["outputs"]
            if not np.array_equal(outputs[0], expected @ x[0, :RANK]):
                self.wrong.append(f"apply of {name}: wrong numbers")
            self.counts["applies right to the bit"] += 1

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
        workers = self.service.workers()
        if workers and time.monotonic() < self.until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                self.counts["workers killed"] += 1

    def check_all(self) -> None:
        """Compare every set with what was acknowledged, after the last restart."""
        with httpx.Client(base_url=self.service.url, timeout=30) as client:
            for name, expected in self.sets.items():
                if name in self.unknown:
                    continue
                answer = client.get(f"/v1/sets/{name}/adapter_model.safetensors")
                if expected is None:
                    if answer.status_code != 404:
                        self.wrong.append(f"{name} is back after its deletion")
                elif answer.status_code != 200:
                    self.wrong.append(f"{name} is lost: {answer.status_code}")
                else:
                    tensors = safetensors.decode(answer.content)[0]
                    found = next(one for key, one in tensors.items() if "lora_B" in key)
                    if not np.array_equal(found, expected):
                        self.wrong.append(f"{name} has other weights")
                self.counts["sets compared at the end"] += 1
            bad = client.get("/readyz").json()["bad_files"]
            if bad:
                self.wrong.append(f"bad files: {bad}")


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
    """Run everything; return figures, the last of which is what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder) / "store")
        run = Soak(service, seconds, seed)
        try:
            run.run()
            service.kill()
            service.start()
            run.check_all()
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
    figures = soak(options.seconds, options.seed)
    for name, value in figures[:-1]:
        print(f"| {name} | {value} |")
    wrong = figures[-1][1]
    for one in itertools.islice(wrong, 50):
        print("WRONG", one)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
