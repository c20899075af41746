"""What the parts of `make soak` share: a service that is killed, and users who know every answer."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from bonsai_lora.formats import safetensors

COMMAND = str(Path(sys.executable).parent / "bonsai-lora")
BINARY = {"Content-Type": "application/vnd.safetensors"}
WIDTH, RANK, USERS = 256, 4, 3
BUSY = (429, 503, 507)
KILL_SECONDS = 2.5


class Service:
    """The command that serves, restarted on demand."""

    def __init__(self, *flags: str, **variables: str) -> None:
        self._flags = ["--workers", "2", "--stall-seconds", "5", *flags]
        self._variables = {**os.environ, **variables}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [COMMAND, "serve", "--port", str(self.port), *self._flags],
            stderr=subprocess.DEVNULL,
            env=self._variables,
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

    def kill_a_worker(self, rng: random.Random) -> bool:
        """Return whether there was one to kill."""
        workers = self.workers()
        with contextlib.suppress(ProcessLookupError):
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                return True
        return False

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


class UnknownError(Exception):
    """A change that may have been made or not."""


class Soak:
    """The threads, what they count, and what they found wrong."""

    stale_seconds = 0.0
    """How long a service may go on serving what was changed through a different one."""

    def __init__(self, services: list[Service], seconds: float, seed: int) -> None:
        self.services = services
        self.until = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.sets: dict[str, list[np.ndarray | None]] = {}
        """The B of each set as acknowledged last (None: deleted), then those of changes since that
        were neither acknowledged nor refused.
        """
        self.versions: dict[str, int] = {}
        """The acknowledged version of each set that there is."""
        self.changed_at: dict[str, float] = {}
        self._seed = seed

    def run(self, *jobs) -> None:
        """Repeat each job, with a random generator and a number, in a thread until the end."""
        threads = [
            threading.Thread(target=self._guard, args=(job, random.Random(self._seed + 10 * n), n))
            for n, job in enumerate(jobs)
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

    def client(self, rng: random.Random) -> httpx.Client:
        return httpx.Client(base_url=rng.choice(self.services).url, timeout=30)

    def use(self, rng: random.Random, number: int) -> None:
        """Change or apply one of this user's sets, and check the answer to the bit."""
        name = f"user{number}.{rng.randrange(8)}"
        choice = rng.random()
        with self.client(rng) as client:
            if choice < 0.2:
                self.upload(client, name, rng)
            elif choice < 0.25:
                self.change(name, None, lambda: client.delete(f"/v1/sets/{name}"), (204, 404))
            else:
                self.apply_often(client, name, rng)

    def upload(self, client, name: str, rng: random.Random) -> None:
        values = np.random.default_rng(rng.randrange(1 << 30)).integers(-8, 8, (WIDTH, RANK))
        values = values.astype(np.float32)
        files = adapter_files(values)
        self.change(name, values, lambda: client.put(f"/v1/sets/{name}", files=files), (200, 201))

    def change(self, name: str, value, send, good) -> None:
        known = self.sets.setdefault(name, [None])
        try:
            answer = self.sent(send, good)
        except UnknownError:
            known.append(value)
            return
        if answer is not None:
            self.sets[name] = [value]
            self.versions[name] = 0 if value is None else answer.json()["version"]
            self.changed_at[name] = time.monotonic()
            self.counts["changes acknowledged"] += 1

    def sent(self, send, good) -> httpx.Response | None:
        """Return the answer to a change, None if it was refused.

        Raises UnknownError if it is not known whether it was made.
        """
        try:
            answer = send()
        except httpx.ConnectError:
            time.sleep(0.1)  # the service is being started again
            return None
        except httpx.HTTPError:
            self.counts["changes cut off by a kill"] += 1
            raise UnknownError from None
        if answer.status_code in good:
            return answer
        if answer.status_code not in BUSY:
            self.wrong.append(f"{answer.url}: {answer.status_code} {answer.text[:200]}")
        elif answer.json()["code"] == "store_unreachable":
            raise UnknownError
        else:
            self.counts["changes refused as busy"] += 1
        return None

    def apply_often(self, client, name: str, rng: random.Random) -> None:
        """Apply a set as it was acknowledged, which at least the first request asks for by version.

        Then the machine has that version, however old its last look at the bucket is.
        """
        known = self.sets.get(name, [None])
        age = time.monotonic() - self.changed_at.get(name, -1e9)
        if len(known) > 1 or (known[0] is None and age < self.stale_seconds):
            return
        named = {}
        if self.stale_seconds and known[0] is not None:
            named = {"version": self.versions[name]}
        for _ in range(20):
            if self.apply(client, name, known[0], rng, named):
                named = {}

    def apply(self, client, name: str, expected, rng: random.Random, named) -> bool:
        """Return whether the answer was right."""
        x = np.zeros((1, WIDTH), np.float32)
        x[0, :RANK] = [rng.randrange(-8, 8) for _ in range(RANK)]
        path = f"/v1/sets/{name}/adapters/layers.0.self_attn.q_proj/apply"
        body = safetensors.encode({"inputs": x})
        try:
            answer = client.post(path, content=body, headers=BINARY, params=named)
        except httpx.HTTPError:
            self.counts["applies cut off by a kill"] += 1
            time.sleep(0.1)
            return False
        if answer.status_code in BUSY:
            self.counts["applies refused as busy"] += 1
            return False
        if expected is None:
            if answer.status_code != 404:
                self.wrong.append(f"apply of {name}, which is gone: {answer.status_code}")
            return False
        if answer.status_code != 200:
            self.wrong.append(f"apply of {name}: {answer.status_code} {answer.text[:200]}")
            return False
        outputs = safetensors.decode(answer.content)[0]["outputs"]
        if not np.array_equal(outputs[0], expected @ x[0, :RANK]):
            self.wrong.append(f"apply of {name}: wrong numbers")
        self.counts["applies right to the bit"] += 1
        return True

    def check_sets(self, client: httpx.Client) -> None:
        """Compare every set with what was acknowledged, after the last restart.

        A change that was cut off is made as a whole or not at all.
        """
        for name, known in self.sets.items():
            answer = client.get(f"/v1/sets/{name}/adapter_model.safetensors")
            found = weights(answer.content) if answer.status_code == 200 else None
            if answer.status_code not in (200, 404):
                self.wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}")
            elif not any(_same(found, one) for one in known):
                expected = ["deleted" if one is None else "there" for one in known]
                status = "lost" if found is None else "back, or has other weights"
                self.wrong.append(f"{name} is {status}; expected {expected}")
            self.counts["sets compared at the end"] += 1
        bad = client.get("/readyz").json()["bad_files"]
        if bad:
            self.wrong.append(f"bad files: {bad}")


def adapter_files(values: np.ndarray) -> dict[str, bytes]:
    """Return the files of an adapter of one module, whose B is `values`."""
    key = "base_model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{key}.lora_A.weight": np.eye(RANK, WIDTH, dtype=np.float32),
        f"{key}.lora_B.weight": values,
    }
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    return {
        "adapter_config": json.dumps(config).encode(),
        "adapter_model": safetensors.encode(tensors),
    }


def weights(file: bytes) -> np.ndarray:
    """Return the B of such an adapter's file."""
    tensors = safetensors.decode(file)[0]
    return next(one for key, one in tensors.items() if "lora_B" in key)


def _same(found: np.ndarray | None, expected: np.ndarray | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return np.array_equal(found, expected)
