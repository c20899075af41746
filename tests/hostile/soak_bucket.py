"""Two services over one bucket that race and are killed while they change sets: part of soak.py.

Users know what every answer has to be, whichever service they ask. Others count up one number by
`If-Match`, and add modules to the same sets without it. Meanwhile workers and whole services are
killed and started again. At the end both are killed, one loses its cache, and every acknowledged
change must be there, also after `gc` has removed what the kills left over.
"""

import contextlib
import itertools
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from seaweed import seaweed
from soaking import (
    COMMAND,
    KILL_SECONDS,
    RANK,
    USERS,
    WIDTH,
    Service,
    Soak,
    UnknownError,
    adapter_files,
    weights,
)

COUNTER = "counter"
RACERS = 2
MODULES = 60
"""How many modules are added to a set before the next one."""


class BucketSoak(Soak):
    """Users, racing writers and kills over one bucket."""

    stale_seconds = 1.0

    def __init__(self, services: list[Service], seconds: float, seed: int) -> None:
        super().__init__(services, seconds, seed)
        self.counted: list[int] = []
        """Numbers that were acknowledged."""
        self.added: list[tuple[str, str]] = []
        """Sets and modules of them that were acknowledged."""
        self._turns = itertools.count()

    def count_up(self, rng: random.Random, _number: int) -> None:
        """Write the next number over the one that was read, unless somebody else did meanwhile."""
        path = f"/v1/sets/{COUNTER}"
        with self.client(rng) as client:
            try:
                read = client.get(f"{path}/adapter_model.safetensors")
            except httpx.HTTPError:
                return
            if read.status_code != 200:
                return
            number = number_in(read) + 1
            change = {"files": counter_files(number), "headers": {"If-Match": read.headers["etag"]}}
            try:
                answer = self.sent(lambda: client.put(path, **change), (200, 412))
            except UnknownError:
                return
        if answer is not None and answer.status_code == 200:
            self.counted.append(number)
        elif answer is not None:
            self.counts["numbers that were second"] += 1
            time.sleep(rng.uniform(0, 0.05))

    def add(self, rng: random.Random, _number: int) -> None:
        """Add a module to a set that others add to as well, on top of whatever it has."""
        turn = next(self._turns)
        name, module = f"shared{turn // MODULES}", f"m{turn}"
        path, body = f"/v1/sets/{name}/adapters/{module}", {"d_in": 4, "d_out": 4}
        with self.client(rng) as client:
            try:
                made = self.sent(lambda: client.post("/v1/sets", json={"name": name}), (201, 409))
                if made is not None and self.sent(lambda: client.put(path, json=body), (201,)):
                    self.added.append((name, module))
            except UnknownError:
                return

    def kill(self, rng: random.Random, _number: int) -> None:
        """Kill a worker, or a whole service, every few seconds."""
        time.sleep(min(KILL_SECONDS, max(0.0, self.until - time.monotonic())))
        service = rng.choice(self.services)
        if rng.random() < 0.5:
            self.counts["workers killed"] += service.kill_a_worker(rng)
        else:
            service.kill()
            service.start()
            self.counts["services killed"] += 1

    def check_all(self, service: Service) -> None:
        """Compare everything with what was acknowledged."""
        with httpx.Client(base_url=service.url, timeout=30) as client:
            self.check_sets(client)
            self._check_number(client)
            found = client.get("/v1/sets", params={"prefix": "shared", "limit": 1000}).json()
            for name in (one["name"] for one in found["sets"]):
                self._check_modules(client, name)
            self.counts["modules compared at the end"] += len(self.added)
            lost = {name for name, _ in self.added} - {one["name"] for one in found["sets"]}
            self.wrong += [f"{name} is lost" for name in sorted(lost)]

    def _check_number(self, client: httpx.Client) -> None:
        """Each change, acknowledged or cut off, has to have raised the number by one, once."""
        number = number_in(client.get(f"/v1/sets/{COUNTER}/adapter_model.safetensors"))
        version = client.get(f"/v1/sets/{COUNTER}").json()["version"]
        if len(set(self.counted)) < len(self.counted):
            self.wrong.append("two changes were acknowledged on top of the same version")
        if number < max(self.counted, default=0) or version != number + 1:
            self.wrong.append(f"{len(self.counted)} numbers, the last {number}, version {version}")
        self.counts["numbers acknowledged"] = len(self.counted)

    def _check_modules(self, client: httpx.Client, name: str) -> None:
        """Each version of the set has to have one module more than the one before."""
        found = client.get(f"/v1/sets/{name}").json()
        modules = {one["name"] for one in found["modules"]}
        lost = {module for at, module in self.added if at == name} - modules
        if lost or found["version"] != 1 + len(modules):
            self.wrong.append(f"{name}: {found['version']=}, {len(modules)} modules, lost {lost}")

    def check_sums(self, service: Service) -> None:
        """Compare the sums with the listing, as nobody writes any more and `gc` corrected them."""
        with httpx.Client(base_url=service.url, timeout=30) as client:
            found = client.get("/v1/stats").json()["set_count"]
            sets = client.get("/v1/sets", params={"limit": 1000}).json()["sets"]
        if found != len(sets):
            self.wrong.append(f"the sums have {found} sets, the listing {len(sets)}")

    def collect(self, store: str, variables: dict[str, str]) -> None:
        """Remove what no pointer names, and read every blob that one does."""
        time.sleep(1.1)  # the bucket's times are whole seconds
        gc = self._command("gc", "--store", store, "--grace-hours", "0", **variables)
        self._command("verify", "--store", store, **variables)
        removed = re.search(r"(\d+) blobs? removed", gc)
        self.counts["blobs removed by gc"] = int(removed[1]) if removed else 0

    def _command(self, *words: str, **variables: str) -> str:
        done = subprocess.run(
            [COMMAND, *words],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode or done.stderr:
            self.wrong.append(f"{words[0]}: {done.returncode} {done.stdout}{done.stderr}"[:2000])
        return done.stdout


def soak_bucket(seconds: float, seed: int) -> list[tuple[str, object]]:
    """Run everything over a bucket; return figures, the last of which is what was wrong."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "weed").mkdir()
        server = stack.enter_context(seaweed(folder / "weed"))
        store = server.store("soak")
        flags = ("--store", store, "--stale-seconds", str(BucketSoak.stale_seconds))
        services = []
        for name in ("one", "other"):
            cache = ("--cache", str(folder / name))
            services.append(Service(*flags, *cache, **server.variables))
            stack.callback(services[-1].stop)
        run = BucketSoak(services, seconds, seed)
        httpx.put(f"{services[0].url}/v1/sets/{COUNTER}", files=counter_files(0)).raise_for_status()
        run.run(*[run.use] * USERS, *[run.count_up, run.add] * RACERS, run.kill)
        for service in services:
            service.kill()
        shutil.rmtree(folder / "other")
        for service in services:
            service.start()
        time.sleep(1.5 * run.stale_seconds)
        for service in services:
            run.check_all(service)
        run.wrong += [f"a service exited with {code}" for one in services if (code := one.stop())]
        run.collect(store, server.variables)
        shutil.rmtree(folder / "one")
        services[0].start()
        run.check_all(services[0])
        run.check_sums(services[0])
    return [("seconds", seconds), *sorted(run.counts.items()), ("wrong", run.wrong)]


def counter_files(number: int) -> dict[str, bytes]:
    return adapter_files(np.full((WIDTH, RANK), number, np.float32))


def number_in(answer: httpx.Response) -> int:
    """Return the number of a set; raises ValueError if it is not one number throughout."""
    (number,) = set(weights(answer.raise_for_status().content).ravel().tolist())
    return int(number)
