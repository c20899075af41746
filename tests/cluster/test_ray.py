"""The service on Ray Serve with three nodes: the same answers, and what a node's death costs.

Ray listens on all interfaces, and whoever reaches it can run code: it runs in a network namespace
of its own, with a token.
"""

import contextlib
import csv
import os
import re
import shutil
import socket
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import TINY, upload
from engines import RAY_PORT, balance_algorithm, ray_cluster, ray_variables
from namespace import own_network
from routes import routes
from sets_under_load import CLIENTS, Load, create_all
from test_command import running

from bonsai_lora.formats import safetensors

# Ray reads its variables when it is imported, so the fixture that sets them imports it.
if find_spec("ray") is None:
    pytest.skip("no Ray; run make test-cluster", allow_module_level=True)

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

MODULE = "model.layers.0.self_attn.q_proj"
BINARY = {"Content-Type": "application/vnd.safetensors"}


@pytest.fixture(scope="module")
def folder():
    """A folder with a short path, since HAProxy's socket is in one of its folders."""
    with tempfile.TemporaryDirectory(prefix="ray-") as path:
        shutil.copytree(TINY / "base", Path(path) / "bases" / "tiny-qwen3")
        yield Path(path)


@pytest.fixture(scope="module")
def nodes(folder):
    """The cluster, and its nodes but the head."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(own_network())
        except OSError as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in ray_variables(folder / "h").items():
            patch.setenv(name, value)
        settings = {"store": str(folder / "store"), "bases": str(folder / "bases")}
        yield stack.enter_context(ray_cluster(settings))


@pytest.fixture
def client(nodes):
    with httpx.Client(base_url=f"http://127.0.0.1:{RAY_PORT}", timeout=60) as client:
        yield client


def requests():
    """Requests of each kind: JSON, binary, ranges, streams, `/v2`, merged files, errors."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((3, 64)).astype(np.float32)
    weights = rng.standard_normal((128, 64)).astype(np.float32)
    adapter = f"/v1/sets/plain/adapters/{MODULE}"
    file = "/v1/sets/plain/adapter_model.safetensors"
    merged = "/v1/bases/tiny-qwen3/merged/plain/model.safetensors"
    tensor = {"name": MODULE, "shape": [3, 64], "datatype": "FP32", "data": rows.ravel().tolist()}
    octets = {"Content-Type": "application/octet-stream"}
    yield "GET", "/v1/sets/plain", {}
    yield "GET", f"{adapter}", {}
    yield "POST", f"{adapter}/apply", {"json": {"inputs": rows.tolist()}}
    yield (
        "POST",
        f"{adapter}/apply",
        {"content": safetensors.encode({"inputs": rows}), "headers": BINARY},
    )
    yield "POST", f"{adapter}/merge?dtype=F32", {"content": weights.tobytes(), "headers": octets}
    yield "GET", file, {}
    yield "HEAD", file, {}
    yield "GET", file, {"headers": {"Range": "bytes=100-4999"}}
    yield "GET", file, {"headers": {"Range": "bytes=0-9,50-99"}}
    yield "GET", merged, {}
    yield "GET", merged, {"headers": {"Range": "bytes=-1000"}}
    yield "POST", "/v2/models/plain/infer", {"json": {"inputs": [tensor]}}
    yield "GET", "/adapters/plain/resolve/main/adapter_config.json", {}
    yield "GET", "/v1/sets/absent", {}
    yield "POST", f"{adapter}/apply", {"json": {"inputs": [[1.0]]}}
    yield "GET", file, {"headers": {"Range": "bytes=99999999-"}}


def comparable(answer):
    """An answer without what is chosen at random or tells the time."""
    kept = {"content-type", "content-range", "etag", "accept-ranges", "content-length", "location"}
    headers = {name: value for name, value in answer.headers.items() if name in kept}
    boundary = re.search(r"boundary=(\S+)", headers.get("content-type", ""))
    body = answer.content
    if "json" in headers.get("content-type", ""):
        body = re.sub(rb'"request_id":"[^"]*"', b"", body)
        body = re.sub(rb'"id":"[^"]*"', b"", body)
        headers.pop("content-length", None)
    if boundary:
        body = body.replace(boundary[1].encode(), b"boundary")
        headers["content-type"] = headers["content-type"].replace(boundary[1], "boundary")
    return answer.status_code, headers, body


def test_answers_are_those_of_one_process(client, folder):
    upload(client, "plain", TINY / "plain").raise_for_status()
    flags = ("--store", str(folder / "store"), "--bases", str(folder / "bases"))
    with (
        running(*flags, BONSAI_LORA_KERNELS="auto") as (url, _),
        httpx.Client(base_url=url, timeout=60) as alone,
    ):
        for method, path, options in requests():
            expected = comparable(alone.request(method, path, **options))
            assert comparable(client.request(method, path, **options)) == expected, path


def test_an_answer_has_one_request_id(client):
    answer = client.get("/readyz")
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_the_manifest_says_what_the_code_asks_for():
    from bonsai_lora.deploy.ray_serve import BALANCE_ALGORITHM

    assert balance_algorithm() == BALANCE_ALGORITHM


def sessions(folder):
    """How many requests HAProxy has sent to each replica."""
    (path,) = folder.glob("h/**/*.sock")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"show stat\n")
        with connection.makefile() as lines:
            rows = list(csv.DictReader(lines))
    return {
        row["svname"]: int(row["stot"])
        for row in rows
        if row["stot"]
        and row["svname"] not in ("FRONTEND", "BACKEND")
        and "http" in row["# pxname"]
    }


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "A_b.c"])
def test_every_route_that_names_a_set_goes_to_its_replica(client, folder, name):
    before = sessions(folder)
    found = list(routes())
    for method, path in found:
        client.request(method, path.replace("{set}", name))
    after = sessions(folder)
    grown = {server: after[server] - before[server] for server in before}
    assert sorted(grown.values())[-2:] == [0, len(found)], grown


def test_a_nodes_death_costs_only_what_was_in_flight(client, nodes):
    cluster, others = nodes
    create_all(client)
    with Load(str(client.base_url)) as load:
        time.sleep(2)
        cluster.remove_node(others[0], allow_graceful=False)
        time.sleep(8)
        sent = load.sent.total()
        time.sleep(1)
    print(load)
    assert load.sent.total() > sent, "clients wait for an answer"
    assert load.sent["read"] > 100
    assert load.failed.total() <= 3 * CLIENTS


def test_ray_can_be_reached_from_nowhere_else(nodes):
    """Every port that Ray opened is in a namespace with nothing but a loopback interface."""
    interfaces = Path("/proc/self/net/dev").read_text()
    names = re.findall(r"^\s*(\S+):", interfaces, re.MULTILINE)
    assert names == ["lo"]
    assert os.environ["RAY_AUTH_MODE"] == "token"
