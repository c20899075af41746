"""Where the time of one request goes: our own code, stage by stage, without a socket.

A connection is fed the bytes of a request and its answer is dropped; then each stage alone. What is
left of a request's time over loopback (benchmarks/throughput.py) is the kernel, the event loop,
and memory that was not in the cache. All as in a worker on one core: with more, long applies run
in threads.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from json import dumps

from load import SERVER_CORE
from measure import report
from throughput import WIDTH, native_binary, native_json, oip_binary, vectors

import numpy as np
import uvicorn
from uvicorn.server import ServerState

from bonsai_lora.api.app import create_app
from bonsai_lora.api.auth import Authenticator
from bonsai_lora.cli.serve import keep_freed_memory
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.fast_lane.protocol import LaneConnection
from bonsai_lora.fast_lane.routes import FastLane
from bonsai_lora.service.keys import digest_of, new_token
from bonsai_lora.settings import Settings
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire import json

SECONDS = 0.2


class Nowhere(asyncio.Transport):
    """A transport that drops what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = asyncio.Event()

    def write(self, _data) -> None:
        self.written.set()

    def writelines(self, _parts) -> None:
        self.written.set()

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


def microseconds(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        run()
        count += 1
    return (time.perf_counter() - started) / count * 1e6


def make_app(store: str):
    """Return the application with a set of random matrices, and that set."""
    app = create_app(Settings(store=store, no_auth=True))
    app.state.fast_lane = FastLane(app)
    rng = np.random.default_rng(0)
    made = BonsaiLoraSet.new(LoraConfig(), "", "bench")
    for rank in (8, 16):
        config = LoraConfig(rank=rank, alpha=float(rank))
        a_matrix = rng.standard_normal((rank, WIDTH)).astype(np.float32)
        b_matrix = rng.standard_normal((WIDTH, rank)).astype(np.float32)
        adapter = LoraAdapter(config, a_matrix, b_matrix, config.scaling)
        made = made.with_registry(made.registry.add(f"r{rank}", adapter))
    sets = app.state.store
    with sets.lock("bench"):
        return app, sets.write(
            NextVersion(lora_set=made, origin="peft", now="2026-01-01T00:00:00Z", previous=None)
        )


async def whole(app, request: bytes) -> float:
    """Return the microseconds from a request's bytes to its answer's."""
    config = uvicorn.Config(app, http=LaneConnection, log_config=None, proxy_headers=False)
    config.load()
    connection = LaneConnection(config, ServerState(), {})
    transport = Nowhere()
    connection.connection_made(transport)

    def feed() -> None:
        at = 0
        while at < len(request):
            target = connection.get_buffer(-1)
            size = min(len(target), len(request) - at)
            target[:size] = request[at : at + size]
            connection.buffer_updated(size)
            at += size

    async def answered() -> None:
        transport.written.clear()
        feed()
        if app.state.context.short.in_progress:  # in a thread, or waiting for its turn
            await transport.written.wait()

    for _ in range(3):
        await answered()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        await answered()
        count += 1
    return (time.perf_counter() - started) / count * 1e6


def stages(app, stored: StoredSet, rows: int, rank: int) -> dict[str, float]:
    """Return the microseconds of the stages of an apply."""
    adapter = stored.lora_set.registry.adapters[f"r{rank}"]
    x = vectors(rows)
    text = b"".join(json.encode({"inputs": x}))
    return {
        "authentication, without keys": auth_microseconds(app.state.authenticator, b""),
        "authentication, with a key": auth_microseconds(*authenticator_with_a_key(app)),
        "look-up of the set": microseconds(lambda: app.state.context.store.read("bench")),
        "x·Aᵀ·Bᵀ": microseconds(lambda: adapter.apply(x)),
        "count and observe": microseconds(
            lambda: app.state.context.metrics.count_request("POST", "/bench", 200, 1e-4)
        ),
        "JSON to an array": microseconds(lambda: read_json(text)),
        "an array to JSON": microseconds(lambda: json.encode({"outputs": x})),
    }


def auth_microseconds(auth: Authenticator, header: bytes) -> float:
    """Return what the check of one request costs on the fast lane."""
    headers = {b"host": b"127.0.0.1:8000", b"authorization": header}
    peer = auth.peer_of(("127.0.0.1", 8000), ("127.0.0.1", 50000))
    return microseconds(lambda: auth.admit("/v1/apply", headers, peer).context("apply"))


def authenticator_with_a_key(app) -> tuple[Authenticator, bytes]:
    """Return an authenticator, and the Authorization header of a key with rates and a prefix."""
    number, token = new_token()
    entry = {
        "id": number,
        "sha256": digest_of(token.encode()).hex(),
        "scopes": ["apply"],
        "prefixes": ["bench."],
        "expires_at": "2999-01-01T00:00:00Z",
        "limits": {"requests_per_second": 1e9, "rows_per_second": 1e9},
    }
    path = app.state.store.root / "keys.json"
    path.write_text(dumps({"keys": [entry]}))
    path.chmod(0o600)
    settings = Settings(keys_file=path)
    return Authenticator(settings, app.state.context), b"Bearer " + token.encode()


def read_json(text: bytes) -> None:
    fields = json.decode_object(text, frozenset({"inputs"}))
    json.decode_tensor(fields["inputs"], "inputs")


def main() -> None:
    os.sched_setaffinity(0, {SERVER_CORE})
    keep_freed_memory()
    rows_out = []
    with tempfile.TemporaryDirectory() as store:
        app, stored = make_app(store)
        for rows, rank in ((1, 8), (32, 16), (256, 16)):
            x = vectors(rows)
            found = {
                "whole, binary": asyncio.run(whole(app, native_binary(x, rank))),
                "whole, /v2 binary": asyncio.run(whole(app, oip_binary(x, rank))),
                "whole, JSON": asyncio.run(whole(app, native_json(x, rank))),
                **stages(app, stored, rows, rank),
            }
            rows_out.append(
                {"µs for rows × rank": f"{rows} × {rank}"}
                | {name: round(one, 1) for name, one in found.items()}
            )
    turned = [
        {"µs": name} | {str(row["µs for rows × rank"]): row[name] for row in rows_out}
        for name in rows_out[0]
        if not name.startswith("µs")
    ]
    report("Where the time of a request goes, without a socket", turned)


if __name__ == "__main__":
    main()
