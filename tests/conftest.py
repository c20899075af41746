import asyncio
import contextlib
import functools
import itertools
import json
import logging
import os
import shutil
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

# Like the command, before NumPy loads. More threads than cores wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import httpx
import hypothesis
import numpy as np
import pytest
import uvicorn
from targets import TARGETS, name_of

from bonsai_lora.api.app import create_app
from bonsai_lora.cli import serve
from bonsai_lora.cli.logs import configure_logging
from bonsai_lora.core import backend
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

sys.path[:0] = [
    str(Path(__file__).parent / part)
    for part in (
        "",
        "client",
        "core",
        "api",
        "end_to_end",
        "hostile",
        "peers",
        "storage",
        "cluster",
        "mutants",
    )
]

configure_logging("warning", "console")
# Each new httpx client would load the certificates of all authorities, which takes 50 ms.
ssl.create_default_context = functools.cache(ssl.create_default_context)
# Like `serve` on a loopback address: no keys, and the tests of keys name a file of them.
os.environ["BONSAI_LORA_NO_AUTH"] = "true"
# Busy machines take their time.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")
# For mutants: a failure is enough, and need not be made small.
hypothesis.settings.register_profile(
    "mutants",
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    database=None,
)

DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny-qwen3"


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no core has nothing to do at the end."""
    longest = ("end_to_end", "hostile", "test_documents_run.py")
    items.sort(key=lambda item: not any(part in longest for part in item.path.parts))


@pytest.fixture(autouse=True)
def own_logging():
    """Undo what `serve` configures in this process: its stream is closed after the test."""
    root, server = logging.getLogger(), logging.getLogger("uvicorn.error")
    handlers, levels = root.handlers, (root.level, server.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    server.setLevel(levels[1])


@pytest.fixture
def settings(tmp_path):
    return Settings(store=str(tmp_path / "store"))


@pytest.fixture
def app(settings):
    return create_app(settings)


@pytest.fixture
def client(app):
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
def service(settings, tmp_path):
    """The URL of a service that knows the base `tiny-qwen3`, which the adapters of the data name."""
    shutil.copytree(TINY / "base", tmp_path / "bases" / "tiny-qwen3")
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    with serving(create_app(known)) as url:
        yield url


def gain_of(client, path):
    """The gain in the head of a merged file, when it is there."""
    for _ in range(500):
        found = client.head(path).headers.get("bonsai-delta-gain")
        if found is not None:
            return float(found)
        time.sleep(0.01)
    raise AssertionError(path)


@pytest.fixture
def based(service):
    """A client of that service."""
    with httpx.Client(base_url=service, timeout=30) as client:
        yield client


class _Server(uvicorn.Server):
    """uvicorn's, without its waits of 0.1 s: hundreds of tests start and stop one."""

    async def main_loop(self):
        for counter in itertools.count():
            if await self.on_tick(counter):
                return
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets=None):  # noqa: ARG002
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await self.lifespan.shutdown()


@contextlib.contextmanager
def serving(app, http=None, **options):
    """Serve `app` on a free loopback port, in a thread; yield its URL.

    Serves like `bonsai-lora serve`, or with the uvicorn protocol `http`.
    """
    settings = app.state.context.settings
    serve.install_fast_lane(app, settings)
    server = _Server(
        uvicorn.Config(
            app,
            port=0,
            http=http or serve.connection_class(settings),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            **options,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.002)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def store(app):
    return app.state.store


@pytest.fixture
def plain(client):
    """A client, and the set `plain`."""
    upload(client, "plain", TINY / "plain")
    return client


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def read_tensors(path):
    """The tensors of a safetensors file by name."""
    return safetensors.decode(path.read_bytes())[0]


def upload(client, name, folder, **options):
    """PUT the PEFT adapter in `folder` as set `name`."""
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    return client.put(f"/v1/sets/{name}", files=files, **options)


def upload_parts(client, name, config, tensors, **options):
    """PUT a PEFT adapter made of a configuration and arrays."""
    files = {"adapter_config": json.dumps(config), "adapter_model": safetensors.encode(tensors)}
    return client.put(f"/v1/sets/{name}", files=files, **options)


def peft_config(**changes):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}


def peft_tensors(rng, module="model.layers.0.self_attn.q_proj", rank=4, d_in=6, d_out=5):
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": rng.standard_normal((rank, d_in)).astype(np.float32),
        f"{prefix}.lora_B.weight": rng.standard_normal((d_out, rank)).astype(np.float32),
    }


def connect(client):
    url = client.base_url
    return socket.create_connection((url.host, url.port), timeout=20)


def read_answer(connection, rest=b""):
    """Status, body, and what already came of the next answer."""
    while b"\r\n\r\n" not in rest:
        part = connection.recv(1 << 16)
        assert part, rest
        rest += part
    head, _, rest = rest.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
    while len(rest) < length:
        part = connection.recv(1 << 16)
        assert part
        rest += part
    return int(head.split()[1]), rest[:length], rest[length:]


def snapshot(store):
    """What is stored: the bytes of every set file."""
    return {path.name: path.read_bytes() for path in (store.root / "sets").iterdir()}


def assert_problem(response, status, code):
    """Check that the response is a problem with this status and code; return its body."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert body["detail"]
    assert response.headers["x-request-id"] == body["request_id"]
    return body


@functools.cache
def kernels_for(target):
    """The kernels for a target, compiled once for all tests; None for the definition."""
    if target is None:
        return None
    from bonsai_lora.kernels.arrays import ArrayKernels

    return ArrayKernels(target)


@pytest.fixture(params=TARGETS[1:], ids=name_of)
def kernels(request):
    """The kernels, for each target in turn."""
    return kernels_for(request.param)


@pytest.fixture(params=TARGETS, ids=name_of)
def computing(request, monkeypatch):
    """Compute with the definition (None), then with the kernels for each target in turn."""
    made = kernels_for(request.param)
    monkeypatch.setattr(backend, "running", lambda: made)
    return made
