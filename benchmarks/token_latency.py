"""How long does one decode step of Qwen3-8B wait for the adapters of a rank-16 set.

A frontend that runs the base model asks four times a layer, one after the other: q, k and v
together, o, gate and up together, down; 144 requests of one float32 row. Each way to ask is timed
against the same products in this process, and against a bare exchange of as many bytes. Server and
client have a core each. Flags: --tokens, --json FILE.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from load import CLIENT_CORE, SERVER_CORE, Address, post
from measure import report
from rivals.bare_exchange import LENGTHS, LONGEST
from server import serving

import ml_dtypes
import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.core.shapes import MODELS
from bonsai_lora.formats import safetensors
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore

MODEL, RANK = MODELS["qwen3-8b"], 16
MODULES = MODEL.modules()
KINDS = {
    "q, k, v": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate, up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}
BARE = Path(__file__).parent / "rivals" / "bare_exchange.py"
TOKENS_A_TURN = 4
OPTIONS = argparse.ArgumentParser()
OPTIONS.add_argument("--tokens", type=int, default=200)

Ask = Callable[[], object]


@dataclass(frozen=True)
class Step:
    """One request of a token: its modules, their row of inputs and the outputs that are right."""

    kind: str
    modules: list[str]
    x: np.ndarray
    outputs: list[np.ndarray]

    @property
    def output_bytes(self) -> int:
        return sum(one.nbytes for one in self.outputs)


def write_set(folder: str) -> LoraRegistry:
    """Store a set of random bfloat16 matrices; return its adapters as the service opens them."""
    rng = np.random.default_rng(0)
    config = LoraConfig(rank=RANK, alpha=float(RANK))
    adapters = {}
    for name, (d_in, d_out) in MODULES.items():
        a_matrix = rng.standard_normal((RANK, d_in), np.float32).astype(ml_dtypes.bfloat16)
        b_matrix = rng.standard_normal((d_out, RANK), np.float32).astype(ml_dtypes.bfloat16)
        adapters[name] = LoraAdapter(config, a_matrix, b_matrix, config.scaling)
    made = BonsaiLoraSet.new(config, "qwen3-8b", "bench")
    made = made.with_registry(made.registry.add_all(adapters))
    store = SetStore(Path(folder))
    with store.lock("bench"):
        now = "2026-01-01T00:00:00Z"
        return store.write(
            NextVersion(lora_set=made, origin="peft", now=now, previous=None)
        ).lora_set.registry


def steps_of(registry: LoraRegistry) -> list[Step]:
    rng = np.random.default_rng(1)
    found = []
    for layer in range(MODEL.num_layers):
        for kind, parts in KINDS.items():
            modules = [f"model.layers.{layer}.{part}" for part in parts]
            x = rng.standard_normal((1, MODULES[modules[0]][0]), np.float32)
            outputs = [registry.get(one).apply(x) for one in modules]
            found.append(Step(kind, modules, x, outputs))
    return found


class Connection:
    """Sends bytes and takes bytes, with as little work as Python can do it."""

    def __init__(self, address: Address | str) -> None:
        self._socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        if not isinstance(address, str):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.connect(address)
        self._buffer = memoryview(bytearray(LONGEST))

    def ask(self, request: bytes) -> memoryview:
        """Return the body of the answer to an HTTP request, valid until the next one."""
        self._socket.sendall(request)
        got, body = 0, 3
        while body == 3:
            got += self._receive(got)
            body = bytes(self._buffer[: min(got, 4096)]).find(b"\r\n\r\n") + 4
        head = bytes(self._buffer[:body]).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(bytes(self._buffer[:got]).decode())
        end = body + int(head.partition(b"content-length:")[2].partition(b"\r")[0])
        while got < end:
            got += self._receive(got)
        return self._buffer[body:end]

    def exchange(self, message: bytes, length: int) -> None:
        """Send a message and take an answer of `length` bytes."""
        self._socket.sendall(message)
        got = 0
        while got < length:
            got += self._receive(got)

    def _receive(self, at: int) -> int:
        count = self._socket.recv_into(self._buffer[at:])
        if not count:
            raise RuntimeError("the server closed the connection")
        return count


def native(step: Step) -> bytes:
    path = "/v1/sets/bench/apply?" + "&".join(f"module={one}" for one in step.modules)
    if len(step.modules) == 1:
        path = f"/v1/sets/bench/adapters/{step.modules[0]}/apply"
    body = safetensors.encode({"inputs": step.x})
    return post(path, body, Content_Type="application/vnd.safetensors")


def infer(step: Step, x_place: dict, places: list[dict]) -> tuple[bytes, dict[str, str]]:
    """Return the JSON of an inference request and the header that says its length."""
    x = {"name": "x", "shape": list(step.x.shape), "datatype": "FP32", "parameters": x_place}
    outputs = [
        {"name": name, "parameters": place}
        for name, place in zip(step.modules, places, strict=True)
    ]
    text = json.dumps({"inputs": [x], "outputs": outputs}).encode()
    return text, {"Inference-Header-Content-Length": str(len(text))}


def by_body(step: Step) -> bytes:
    places = [{"binary_data": True} for _ in step.modules]
    text, length = infer(step, {"binary_data_size": step.x.nbytes}, places)
    return post("/v2/models/bench/infer", text + step.x.tobytes(), **length)


def by_memory(step: Step, memory: SharedMemory, connection: Connection) -> Ask:
    """The inputs are at the start of the region, the outputs after them."""
    at, places = 0, []
    for one in (step.x, *step.outputs):
        place = {"shared_memory_region": "bench", "shared_memory_byte_size": one.nbytes}
        places.append(place | {"shared_memory_offset": at})
        at += one.nbytes
    request = post("/v2/models/bench/infer", infer(step, places[0], places[1:])[0])
    source, start, end = memoryview(step.x).cast("B"), step.x.nbytes, at

    def ask() -> bytes:
        memory.buf[:start] = source
        connection.ask(request)
        return bytes(memory.buf[start:end])

    return ask


def check(step: Step, body: memoryview | bytes) -> None:
    """Raise unless `body` ends with the outputs."""
    got = np.frombuffer(bytes(body[-step.output_bytes :]), np.float32)
    expected = np.concatenate(step.outputs, axis=1)[0]
    if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-4, atol=1e-3):
        raise RuntimeError(f"{step.modules} gave something else")


def ours(steps: list[Step], address: Address | str, memory: SharedMemory) -> dict[str, list[Ask]]:
    """Return each form of asking at this address, checked, with a call per step."""
    connection = Connection(address)

    def asking(request: bytes) -> Ask:
        return lambda: connection.ask(request)

    forms = {
        "/v1 binary": [asking(native(step)) for step in steps],
        "/v2 binary": [asking(by_body(step)) for step in steps],
        "/v2 shared memory": [by_memory(step, memory, connection) for step in steps],
    }
    for asks in forms.values():
        for step, ask in zip(steps, asks, strict=True):
            check(step, ask())
    return forms


@contextlib.contextmanager
def bare(steps: list[Step], address: str) -> Iterator[list[Ask]]:
    """Exchange as many bytes as /v1 does with a server that computes nothing."""

    def exchanging(step: Step) -> Ask:
        request, length = native(step), step.output_bytes + 256
        message = LENGTHS.pack(len(request), length) + request[LENGTHS.size :]
        return lambda: connection.exchange(message, length)

    command = [sys.executable, str(BARE), str(SERVER_CORE), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline().strip()
        connection = Connection(("127.0.0.1", int(said)) if address == "tcp" else said)
        try:
            yield [exchanging(step) for step in steps]
        finally:
            process.terminate()


def in_process(step: Step, registry: LoraRegistry) -> Ask:
    adapters = [registry.get(one) for one in step.modules]
    return lambda: [adapter.apply(step.x) for adapter in adapters]


def measure(rivals: dict[str, list[Ask]], tokens: int) -> dict[str, np.ndarray]:
    """Return the µs of each request, (tokens, requests), by rival; they take turns."""
    found: dict[str, list[list[float]]] = {name: [] for name in rivals}
    clock = time.perf_counter_ns
    for _ in range(-(-tokens // TOKENS_A_TURN)):
        for name, asks in rivals.items():
            for ask in asks:  # to warm up
                ask()
            for _ in range(TOKENS_A_TURN):
                times = [clock()]
                for ask in asks:
                    ask()
                    times.append(clock())
                found[name].append(times)
    return {name: np.diff(times, axis=1) / 1e3 for name, times in found.items()}


def summary(name: str, times: np.ndarray, kinds: np.ndarray) -> dict[str, object]:
    tokens = sorted(times.sum(axis=1) / 1e3)
    row: dict[str, object] = {
        "way": name,
        "p50 ms": f"{statistics.median(tokens):.1f}",
        "p99 ms": f"{tokens[int(len(tokens) * 0.99)]:.1f}",
    }
    return row | {f"{kind}, µs": round(float(np.median(times[:, kinds == kind]))) for kind in KINDS}


def main() -> None:
    options = OPTIONS.parse_known_args()[0]
    os.sched_setaffinity(0, {CLIENT_CORE})
    memory = SharedMemory(create=True, size=LONGEST)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            registry, uds = write_set(folder), f"{folder}/x.sock"
            steps = steps_of(registry)
            flags = ["--store", folder, "--uds", uds, "--shared-memory"]
            url, _ = stack.enter_context(serving(*flags, cores={SERVER_CORE}))
            host, _, port = url.removeprefix("http://").partition(":")
            region = json.dumps({"key": memory.name, "offset": 0, "byte_size": memory.size})
            place = "/v2/systemsharedmemory/region/bench/register"
            Connection(uds).ask(post(place, region.encode()))
            rivals = {"in process": [in_process(step, registry) for step in steps]}
            ways = {"TCP": ((host, int(port)), "tcp"), "Unix socket": (uds, f"{folder}/bare.sock")}
            for way, (address, bare_address) in ways.items():
                asks = stack.enter_context(bare(steps, bare_address))
                rivals[f"bare exchange, {way}"] = asks
                forms = ours(steps, address, memory)
                rivals |= {f"{form}, {way}": asks for form, asks in forms.items()}
            found = measure(rivals, options.tokens)
    finally:
        memory.close()
        memory.unlink()
    kinds = np.array([step.kind for step in steps])
    where = f"server on core {SERVER_CORE}, client on core {CLIENT_CORE}"
    report(
        f"One token of Qwen3-8B, rank {RANK}: {len(steps)} requests of one row; {where}",
        [summary(name, times, kinds) for name, times in found.items()],
    )


if __name__ == "__main__":
    main()
