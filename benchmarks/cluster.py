"""What a request costs through HAProxy and through Ray Serve, against one service.

Requests per second over 8 connections, and the CPU of all serving processes for each: the service,
the balancer, and all of Ray. It needs the environment of `make test-cluster` and root, since Ray
runs in a network namespace of its own:

    .venv-cluster/bin/python benchmarks/cluster.py --seconds 5
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
from load import post, run_load
from server import serving

import numpy as np

from bonsai_lora.formats import safetensors

sys.path.append(str(Path(__file__).parent.parent / "tests/cluster"))
from engines import RAY_PORT, balancing, ray_cluster, ray_variables
from namespace import own_network

SETS, WIDTH, ROWS, RANK = 8, 4096, 16, 16
HOST = Path("/proc/self/ns/net").readlink()
"""The network namespace of everything but Ray."""
TICKS = os.sysconf("SC_CLK_TCK")


def serving_processes() -> list[Path]:
    """Return the folders in /proc of what serves.

    That is all in a network namespace of our own, where Ray's processes are, else all descendants.
    """
    own = Path("/proc/self/ns/net").readlink()
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if own == HOST or (folder / "ns/net").readlink() == own:
                parents[int(folder.name)] = int(fields[1])
    me = os.getpid()
    return [
        Path(f"/proc/{process}")
        for process in parents
        if process != me and (own != HOST or me in ancestors(process, parents))
    ]


def ancestors(process: int, parents: dict[int, int]) -> Iterator[int]:
    """Yield the parent of `process`, its parent, and so on."""
    while process := parents.get(process, 0):
        yield process


def cpu_seconds() -> float:
    """Return the CPU that all serving processes have taken."""
    ticks = 0
    for folder in serving_processes():
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def memory_bytes() -> int:
    """Return the proportional set size of all serving processes."""
    total = 0
    for folder in serving_processes():
        with contextlib.suppress(OSError, IndexError):
            text = (folder / "smaps_rollup").read_text()
            total += 1024 * int(text.split("\nPss:")[1].split()[0])
    return total


def requests() -> dict[str, bytes]:
    """Return one request of each size."""
    rows = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    binary = {"Content_Type": "application/vnd.safetensors"}
    path = "/v1/sets/s0/adapters/m/apply"
    return {
        "GET /v1/sets/s0": b"GET /v1/sets/s0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "apply 1×64, JSON": post(
            "/v1/sets/s1/adapters/m/apply",
            b'{"inputs":[[' + b",".join([b"0.5"] * 64) + b"]]}",
            Content_Type="application/json",
        ),
        f"apply {ROWS}×{WIDTH}, safetensors": post(
            path, safetensors.encode({"inputs": rows}), **binary
        ),
    }


def fill(url: str) -> None:
    """Create the sets that the requests name."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(SETS):
            client.post(
                "/v1/sets", json={"name": f"s{number}", "config": {"rank": RANK}}
            ).raise_for_status()
            width = 64 if number == 1 else WIDTH
            body = {"d_in": width, "d_out": width}
            client.put(f"/v1/sets/s{number}/adapters/m", json=body).raise_for_status()


def measure(url: str, seconds: float) -> dict[str, tuple[float, float]]:
    """Return requests per second and CPU in µs per request, of each request."""
    host, _, port = url.removeprefix("http://").partition(":")
    result = {}
    for name, request in requests().items():
        run_load((host, int(port)), request, 0.5)  # to warm up
        before = cpu_seconds()
        measured = run_load((host, int(port)), request, seconds)
        spent = cpu_seconds() - before
        # The load generator has warmed up for a fifth of the time, 0.3 s at most.
        count = measured["rps"] * (seconds + min(0.3, seconds / 5))
        result[name] = measured["rps"], 1e6 * spent / count
    return result


def alone(store: str, seconds: float):
    with serving("--store", store) as (url, _):
        fill(url)
        return measure(url, seconds), memory_bytes()


def through_haproxy(store: str, seconds: float):
    with contextlib.ExitStack() as stack:
        flags = ("--store", store, "--trusted-proxies", "127.0.0.1")
        services = [stack.enter_context(serving(*flags))[0] for _ in range(3)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(balancing(services, folder))
        return measure(url, seconds), memory_bytes()


def through_ray(store: str, seconds: float):
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        os.environ |= ray_variables(Path(folder))
        with own_network(), ray_cluster({"store": store}):
            return measure(f"http://127.0.0.1:{RAY_PORT}", seconds), memory_bytes()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=5)
    seconds = options.parse_args().seconds
    with tempfile.TemporaryDirectory() as store:
        for name, way in (
            ("serve", alone),
            ("HAProxy, 3 services", through_haproxy),
            ("Ray Serve, HAProxy mode, 3 nodes", through_ray),
        ):
            figures, memory = way(store, seconds)
            print(f"{name}: {memory / 1e6:.0f} MB")
            for request, (rate, cpu) in figures.items():
                print(f"  {request:28} {rate:8.0f} requests/s {cpu:8.0f} µs of CPU")


if __name__ == "__main__":
    main()
