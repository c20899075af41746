"""Requests per second over loopback: every form of ours, a bare ASGI application, MLServer.

Each server has one core to itself and the load generator the other; all run at the same time and
are asked in turns. Flags: --seconds per measurement, --rounds, --only ROWS.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from load import CLIENT_CORE, SERVER_CORE, Address, post, run_load
from measure import report
from server import free_port, running, serving

import httpx
import numpy as np
import orjson

from bonsai_lora.formats import safetensors

HERE = Path(__file__).parent
MLSERVER = HERE / "rivals" / ".venv" / "bin" / "mlserver"
CASES = [(1, 8), (32, 16), (256, 16)]
WIDTH = 4096
BINARY = "application/vnd.safetensors"
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
OPTIONS = argparse.ArgumentParser()
OPTIONS.add_argument("--seconds", type=float, default=2.0)
OPTIONS.add_argument("--rounds", type=int, default=3)
OPTIONS.add_argument("--only", type=int, help="only the case of so many rows")


@dataclass(frozen=True)
class Rival:
    """A server, and how it is asked."""

    name: str
    form: str
    address: Address
    request: Callable[[np.ndarray, int], bytes]


def vectors(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)


def native_binary(x: np.ndarray, rank: int) -> bytes:
    path = f"/v1/sets/bench/adapters/r{rank}/apply"
    return post(path, safetensors.encode({"inputs": x}), Content_Type=BINARY)


def native_json(x: np.ndarray, rank: int) -> bytes:
    body = orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY)
    return post(f"/v1/sets/bench/adapters/r{rank}/apply", body, Content_Type="application/json")


def oip_tensor(x: np.ndarray, name: str, **more: object) -> dict[str, object]:
    return {"name": name, "shape": list(x.shape), "datatype": "FP32", **more}


def oip_binary(x: np.ndarray, rank: int) -> bytes:
    tensor = oip_tensor(x, f"r{rank}", parameters={"binary_data_size": x.nbytes})
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    header = json.dumps(asked).encode()
    length = str(len(header))
    return post(
        "/v2/models/bench/infer",
        header + x.tobytes(),
        **{"Inference-Header-Content-Length": length},
    )


def oip_json(path: str, name: str | None = None) -> Callable[[np.ndarray, int], bytes]:
    def request(x: np.ndarray, rank: int) -> bytes:
        tensor = oip_tensor(x, name or f"r{rank}", data=x.reshape(-1))
        body = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)
        return post(path.format(rank=rank), body, Content_Type="application/json")

    return request


def shared_memory(memory: SharedMemory) -> Callable[[np.ndarray, int], bytes]:
    def request(x: np.ndarray, rank: int) -> bytes:
        memory.buf[: x.nbytes] = x.tobytes()
        place = {"shared_memory_region": "bench", "shared_memory_byte_size": x.nbytes}
        there = {**place, "shared_memory_offset": x.nbytes}
        asked = {
            "inputs": [oip_tensor(x, f"r{rank}", parameters=place)],
            "outputs": [{"name": f"r{rank}", "parameters": there}],
        }
        return post("/v2/models/bench/infer", json.dumps(asked).encode())

    return request


@contextlib.contextmanager
def ours(*flags: str, cores: set[int] | None = None) -> Iterator[Address]:
    """The service with a set of random matrices."""
    rng = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory() as store,
        serving("--store", store, *flags, cores=cores or {SERVER_CORE}) as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        client.post("/v1/sets", json={"name": "bench"}).raise_for_status()
        for rank in sorted({rank for _, rank in CASES}):
            tensors = {
                "lora_A": rng.standard_normal((rank, WIDTH)).astype(np.float32),
                "lora_B": rng.standard_normal((WIDTH, rank)).astype(np.float32),
            }
            client.put(
                f"/v1/sets/bench/adapters/r{rank}",
                content=safetensors.encode(tensors),
                headers={"Content-Type": BINARY},
            ).raise_for_status()
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


@contextlib.contextmanager
def our_rivals() -> Iterator[list[Rival]]:
    memory = SharedMemory(create=True, size=2 * 4 * WIDTH * max(rows for rows, _ in CASES))
    try:
        with ours("--shared-memory") as at:
            region = {"key": memory.name, "offset": 0, "byte_size": memory.size}
            url = f"http://{at[0]}:{at[1]}/v2/systemsharedmemory/region/bench/register"
            httpx.post(url, json=region).raise_for_status()
            yield [
                Rival("ours", "binary", at, native_binary),
                Rival("ours", "JSON", at, native_json),
                Rival("ours, /v2", "binary", at, oip_binary),
                Rival("ours, /v2", "JSON", at, oip_json("/v2/models/bench/infer")),
                Rival("ours, /v2", "shared memory", at, shared_memory(memory)),
            ]
    finally:
        memory.close()
        memory.unlink()


@contextlib.contextmanager
def bare(name: str, rank: int, **variables: str) -> Iterator[Rival]:
    port = free_port()
    command = [sys.executable, str(HERE / "rivals" / "bare_asgi.py"), str(port), str(rank)]
    one_thread = {"OPENBLAS_NUM_THREADS": "1", **variables}
    with running(command, "", port, cores={SERVER_CORE}, folder=HERE, **one_thread) as at:
        yield Rival(name, "binary", at, native_binary)


@contextlib.contextmanager
def mlserver() -> Iterator[list[Rival]]:
    """MLServer where `make bench-rivals` installed it."""
    if not MLSERVER.exists():
        yield []
        return
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "mlserver_runtime.py").write_text(
            (HERE / "rivals" / "mlserver_runtime.py").read_text()
        )
        # One process, no metrics, no access log: nothing but the answer.
        settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port()}
        settings |= {"parallel_workers": 0, "debug": False, "metrics_endpoint": None}
        settings |= {"gzip_enabled": False}
        (folder / "settings.json").write_text(json.dumps(settings))
        for rank in {rank for _, rank in CASES}:
            (folder / f"r{rank}").mkdir()
            model = {"name": f"r{rank}", "implementation": "mlserver_runtime.LoraRuntime"}
            model["parameters"] = {"extra": {"rank": rank}}
            (folder / f"r{rank}" / "model-settings.json").write_text(json.dumps(model))
        command = [str(MLSERVER), "start", "."]
        ready = f"/v2/models/r{CASES[0][1]}/ready"
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": temporary}
        with running(command, ready, port, cores={SERVER_CORE}, folder=folder, **one_thread) as at:

            def raw(x: np.ndarray, rank: int) -> bytes:
                kind = "application/octet-stream"
                return post(f"/raw/r{rank}", x.tobytes(), Content_Type=kind)

            infer = oip_json("/v2/models/r{rank}/infer", "inputs")
            yield [
                Rival("MLServer, route of its own", "binary", at, raw),
                Rival("MLServer", "JSON", at, infer),
            ]


def measured(rivals: list[Rival], rows: int, rank: int, seconds: float, rounds: int) -> list[dict]:
    x = vectors(rows)
    requests = [rival.request(x, rank) for rival in rivals]
    found: list[list[dict[str, float]]] = [[] for _ in rivals]
    for _ in range(rounds):
        for rival, request, some in zip(rivals, requests, found, strict=True):
            some.append(run_load(rival.address, request, seconds))
    rows_out = []
    for rival, some in zip(rivals, found, strict=True):
        speeds = [one["rps"] for one in some]
        rows_out.append(
            {
                "rows × rank": f"{rows} × {rank}",
                "form": rival.form,
                "server": rival.name,
                "requests/s": round(statistics.median(speeds)),
                "least – most": f"{min(speeds):.0f} – {max(speeds):.0f}",
                "p50 ms": statistics.median(one["p50_ms"] for one in some),
                "p99 ms": statistics.median(one["p99_ms"] for one in some),
            }
        )
    return rows_out


def main() -> None:
    options = OPTIONS.parse_known_args()[0]
    rows_out = []
    for rows, rank in CASES:
        if options.only not in (None, rows):
            continue
        with (
            our_rivals() as own,
            bare("bare ASGI", rank) as floor,
            bare("bare ASGI, allocator tuned", rank, **TUNED) as tuned,
            mlserver() as others,
        ):
            rivals = sorted([*own, floor, tuned, *others], key=lambda rival: rival.form)
            rows_out += measured(rivals, rows, rank, options.seconds, options.rounds)
    where = f"server on core {SERVER_CORE}, 8 connections from core {CLIENT_CORE}"
    report(f"Requests per second, {WIDTH}→{WIDTH}, {where}", rows_out)


if __name__ == "__main__":
    main()
