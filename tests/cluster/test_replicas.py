"""Services over one bucket, which see each other's changes and nothing else of each other."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import buckets
import httpx
import numpy as np
import pytest
from conftest import TINY, assert_problem, upload
from seaweed import seaweed
from test_command import COMMAND, running, workers_of
from test_workers import wait_until_ready

from bonsai_lora.formats import safetensors
from bonsai_lora.storage.store import SetStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
_numbers = itertools.count()
STORAGE = str(Path(__file__).parents[1] / "storage")


@pytest.fixture(scope="module")
def weed(tmp_path_factory):
    """A server of S3, for all tests."""
    with seaweed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def place(weed):
    """The URL of a store of this test's own."""
    return weed.store(f"test{next(_numbers)}")


@pytest.fixture
def replicas(weed, place, tmp_path):
    """Starts services over one bucket, each as if on a machine of its own."""
    with contextlib.ExitStack() as stack:

        def start(name, *flags):
            flags = ("--store", place, "--cache", str(tmp_path / name), *flags)
            url, process = stack.enter_context(running(*flags, **weed.variables))
            wait_until_ready(url)
            client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            client.process = process
            return client

        yield start


def create(client, name="s", modules=("m",)):
    assert client.post("/v1/sets", json={"name": name}).status_code == 201
    for module in modules:
        body = {"d_in": 4, "d_out": 4}
        assert client.put(f"/v1/sets/{name}/adapters/{module}", json=body).status_code == 201


def version_of(client, name="s"):
    answer = client.get(f"/v1/sets/{name}")
    assert answer.status_code == 200, answer.text
    return answer.json()["version"]


def metric(client, name):
    found = re.findall(rf"^bonsai_lora_{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert len(found) == 1, name
    return float(found[0])


def command(weed, *words, **variables):
    return subprocess.run(
        [COMMAND, *words],
        env={**os.environ, **weed.variables, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def eventually(check, seconds):
    """Return how long it took until `check` was true, at most `seconds`."""
    started = time.monotonic()
    while not check():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return time.monotonic() - started


def test_a_replaced_set_is_read_on_another_replica_within_the_bound(replicas):
    one, other = replicas("one", "--stale-seconds", "2"), replicas("other", "--stale-seconds", "2")
    assert upload(one, "s", TINY / "plain").status_code == 201
    assert other.get("/v1/sets/s/adapter_model.safetensors").content == (
        one.get("/v1/sets/s/adapter_model.safetensors").content
    )
    for version in range(2, 5):
        assert version_of(other) == version - 1
        assert upload(one, "s", TINY / "plain").json()["version"] == version
        assert version_of(one) == version, "at once where it was written"
        assert eventually(lambda: version_of(other) == version, 2.5) < 2.5  # noqa: B023
    assert one.delete("/v1/sets/s").status_code == 204
    assert one.get("/v1/sets/s").status_code == 404
    eventually(lambda: other.get("/v1/sets/s").status_code == 404, 2.5)


def test_a_wanted_version_is_read_at_once(replicas):
    one, other = (
        replicas("one", "--stale-seconds", "60"),
        replicas("other", "--stale-seconds", "60"),
    )
    create(one)
    assert version_of(other) == 2
    changed = one.put("/v1/sets/s/adapters/n", json={"d_in": 4, "d_out": 4})
    assert version_of(other) == 2, "within the stale time"
    assert other.get("/v2/models/s/versions/3").json()["versions"] == ["3"]
    assert version_of(other) == 3
    assert other.get("/v2/models/s/versions/9").status_code == 404
    assert other.get("/v2/models/s/versions/2").status_code == 404, "never an older one"
    assert changed.headers["etag"] == other.get("/v1/sets/s").headers["etag"]


def test_first_reads_at_once_make_one_fetch(replicas):
    one = replicas("one")
    create(one)
    other = replicas("other", "--max-concurrency", "256")

    def apply(_):
        with httpx.Client(base_url=other.base_url, timeout=60) as client:
            body = {"inputs": [[1.0, 2.0, 3.0, 4.0]]}
            return client.post("/v1/sets/s/adapters/m/apply", json=body).status_code

    with ThreadPoolExecutor(200) as threads:
        assert set(threads.map(apply, range(200))) == {200}
    assert metric(other, "cache_misses_total") == 1
    assert metric(other, "store_fetched_bytes_total") > 0
    assert metric(other, "cache_hits_total") >= 100
    gets = metric(other, r'store_requests_total\{kind="get"\}')
    assert gets <= 2 + 3, "pointer and blob, and the sums of /readyz and /metrics"


def test_racing_writers_lose_nothing(replicas):
    """Four writers on two services add modules to one set; each acknowledged one is there."""
    clients = [replicas("one", "--workers", "2"), replicas("other")]
    create(clients[0], modules=())
    acknowledged = []

    def work(number):
        for turn in range(12):
            module = f"m{number}_{turn}"
            path = f"/v1/sets/s/adapters/{module}"
            while True:
                answer = clients[number % 2].put(path, json={"d_in": 4, "d_out": 4})
                if answer.status_code != 503:
                    break
                assert answer.json()["code"] == "busy"
            assert answer.status_code == 201, answer.text
            acknowledged.append(module)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    third = replicas("third")
    found = third.get("/v1/sets/s").json()
    assert {one["name"] for one in found["modules"]} == set(acknowledged)
    assert found["version"] == 1 + len(acknowledged) == 49
    stats = third.get("/v1/stats").json()
    assert (stats["set_count"], stats["adapter_count"]) == (1, 48)


def test_preconditions_hold_between_replicas(replicas):
    one, other = replicas("one"), replicas("other")
    create(one)
    etag = other.get("/v1/sets/s").headers["etag"]
    assert one.put("/v1/sets/s/adapters/n", json={"d_in": 4, "d_out": 4}).status_code == 201
    # The other replica's copy still has this ETag, but the bucket has a newer version.
    answer = other.put(
        "/v1/sets/s/adapters/o", json={"d_in": 4, "d_out": 4}, headers={"If-Match": etag}
    )
    assert_problem(answer, 412, "precondition_failed")
    assert_problem(other.post("/v1/sets", json={"name": "s"}), 409, "set_exists")
    assert other.delete("/v1/sets/s", headers={"If-Match": etag}).status_code == 412
    assert version_of(one) == 3


def test_the_bucket_is_stopped_and_started(replicas, weed):
    service = replicas("one", "--stale-seconds", "0.5", "--stale-if-error-seconds", "600")
    create(service)
    apply = {"inputs": [[1.0, 2.0, 3.0, 4.0]]}
    before = service.post("/v1/sets/s/adapters/m/apply", json=apply).json()
    assert service.get("/readyz").json()["store"] == "reachable"
    weed.stop()
    try:
        time.sleep(0.7)
        slowest = 0.0
        for _ in range(50):
            started = time.monotonic()
            answer = service.post("/v1/sets/s/adapters/m/apply", json=apply)
            slowest = max(slowest, time.monotonic() - started)
            assert answer.json() == before
            time.sleep(0.02)
        assert slowest < 6
        ready = service.get("/readyz")
        assert (ready.status_code, ready.json()["store"]) == (200, "unreachable")
        assert ready.json()["sets"] == 1, "as last known"
        for answer in (
            service.post("/v1/sets", json={"name": "t"}),
            service.put("/v1/sets/s/adapters/n", json={"d_in": 4, "d_out": 4}),
            service.delete("/v1/sets/s"),
            service.get("/v1/sets/unknown"),
            service.get("/v1/sets"),
        ):
            assert_problem(answer, 503, "store_unreachable")
            assert answer.headers["retry-after"]
        assert metric(service, "stale_served_total") >= 1
        assert metric(service, r'store_looks_total\{result="failed"\}') >= 1
        assert service.get("/v1/stats").json()["set_count"] == 1
        last_ok = metric(service, "store_last_ok_timestamp_seconds")
        assert last_ok < time.time() - 0.7
    finally:
        weed.start()
    eventually(lambda: service.post("/v1/sets", json={"name": "t"}).status_code == 201, 20)
    assert service.put("/v1/sets/s/adapters/n", json={"d_in": 4, "d_out": 4}).status_code == 201
    assert service.get("/readyz").json()["store"] == "reachable"
    assert metric(service, "store_last_ok_timestamp_seconds") > last_ok


def test_a_kill_between_blob_and_pointer_leaves_what_gc_removes(weed, place, replicas, tmp_path):
    one = replicas("one")
    create(one)
    script = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {STORAGE!r})\n"
        "from pathlib import Path\n"
        "from buckets import add\n"
        "from bonsai_lora.storage.bucket_store import open_bucket_store\n"
        f"store = open_bucket_store({place!r}, Path({str(tmp_path / 'killed')!r}),\n"
        "    cache_bytes=1 << 30, stale_seconds=5, stale_if_error_seconds=5)\n"
        "write = store._bucket.write\n"
        "def dying(key, path):\n"
        "    write(key, path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "store._bucket.write = dying\n"
        "add(store, 'lost')\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **weed.variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    other = replicas("other")
    assert version_of(other) == 2
    assert {one["name"] for one in other.get("/v1/sets/s").json()["modules"]} == {"m"}
    assert one.put("/v1/sets/s/adapters/n", json={"d_in": 4, "d_out": 4}).status_code == 201
    # One too many until gc; the sums are read again within the stale time.
    eventually(lambda: other.get("/v1/stats").json()["adapter_count"] == 3, 6)
    time.sleep(1.1)  # the bucket's times are whole seconds
    found = command(weed, "gc", "--store", place, "--grace-hours", "0")
    assert (found.returncode, found.stderr) == (0, "")
    assert "3 blobs removed" in found.stdout, found.stdout
    assert version_of(one) == version_of(replicas("third")) == 3
    assert replicas("fourth").get("/v1/stats").json()["adapter_count"] == 2


def test_workers_that_are_killed_lose_nothing_that_was_acknowledged(replicas):
    one, other = replicas("one", "--workers", "2"), replicas("other", "--workers", "2")
    done, stop = {}, threading.Event()

    def write(number):
        client = (one, other)[number % 2]
        name = f"s{number}"
        while not stop.is_set():
            try:
                answer = upload(client, name, TINY / "plain")
            except httpx.TransportError:
                continue
            if answer.status_code in (200, 201):
                done[name] = answer.json()["version"]
            else:
                assert answer.status_code == 503, answer.text

    with ThreadPoolExecutor(4) as threads:
        writers = [threads.submit(write, number) for number in range(4)]
        for round_ in range(4):
            time.sleep(1.0)
            service = (one, other)[round_ % 2]
            for pid in workers_of(service.process):
                os.kill(pid, signal.SIGKILL)
        time.sleep(1.5)
        stop.set()
        for one_writer in writers:
            one_writer.result(timeout=60)
    third = replicas("third")
    assert len(done) == 4
    for name, version in done.items():
        assert version_of(third, name) >= version
        assert third.get(f"/v1/sets/{name}/stats").status_code == 200


def test_commands_over_a_bucket(weed, place, replicas, tmp_path):
    one = replicas("one")
    for number in range(3):
        create(one, f"s{number}")
    assert one.delete("/v1/sets/s2").status_code == 204
    sound = command(weed, "verify", "--store", place)
    assert (sound.returncode, sound.stdout) == (0, "s0  ok\ns1  ok\n")
    missing = command(weed, "verify", "nobody", "--store", place)
    assert (missing.returncode, missing.stdout) == (1, "nobody  missing\n")
    deleted = command(weed, "verify", "s2", "--store", place)
    assert (deleted.returncode, deleted.stdout) == (1, "s2  missing\n")
    time.sleep(1.1)
    found = command(weed, "gc", "--store", place, "--grace-hours", "0")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("2 sets, ")
    assert "1 deleted set removed" in found.stdout
    page = one.get("/v1/sets", params={"base_model_name": ""}).json()
    assert [one["name"] for one in page["sets"]] == ["s0", "s1"]
    assert page["as_of"]
    assert "as_of" not in one.get("/v1/sets").json()
    refused = command(weed, "backup", str(tmp_path / "backup"), "--store", place)
    assert refused.returncode == 2
    assert "bucket" in refused.stderr
    unreachable = command(weed, "verify", "--store", place, AWS_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 2
    assert "does not answer" in unreachable.stderr


def test_a_folder_is_moved_into_a_bucket(weed, place, replicas, tmp_path):
    folder = tmp_path / "folder"
    store = SetStore(folder)
    for name in ("a", "b"):
        buckets.create(store, name)
    backup = str(tmp_path / "backup")
    assert command(weed, "backup", backup, "--store", str(folder)).returncode == 0
    for _ in range(2):  # it can be repeated
        restored = command(weed, "restore", backup, "--store", place)
        assert (restored.returncode, restored.stderr) == (0, ""), restored.stderr
        assert "2 of 2 sets" in restored.stdout
    service = replicas("one")
    for name in ("a", "b"):
        content = service.get(f"/v1/sets/{name}/adapter_model.safetensors").content
        assert content == (folder / "sets" / f"{name}.safetensors").read_bytes()
    assert service.get("/v1/stats").json()["set_count"] == 2


def test_services_that_start_at_once_import_a_folder_once(replicas, tmp_path):
    for number in range(6):
        shutil.copytree(TINY / "plain", tmp_path / "adapters" / f"s{number}")
    flags = ("--sets", str(tmp_path / "adapters"), "--workers", "2")
    with ThreadPoolExecutor(2) as threads:
        clients = list(threads.map(lambda name: replicas(name, *flags), ("one", "other")))
    for number in range(6):
        found = [one.get(f"/v1/sets/s{number}").json() for one in clients]
        assert found[0] == found[1]
        assert found[0]["version"] == 1
    assert [one.get("/v1/stats").json()["set_count"] for one in clients] == [6, 6]
    third = replicas("third", *flags)
    assert metric(third, "cache_bytes") == 0, "what is unchanged is not fetched"
    assert version_of(third, "s3") == 1


def test_without_the_bucket_a_service_starts_and_imports_at_its_next_start(
    weed, place, replicas, tmp_path
):
    shutil.copytree(TINY / "plain", tmp_path / "adapters" / "plain")
    flags = ("--store", place, "--cache", str(tmp_path / "one"))
    flags += ("--sets", str(tmp_path / "adapters"))
    weed.stop()
    try:
        with running(*flags, **weed.variables) as (url, _):
            wait_until_ready(url)
            assert httpx.get(f"{url}/readyz").json()["store"] == "unreachable"
    finally:
        weed.start()
    assert version_of(replicas("one", *flags[-2:]), "plain") == 1


def test_large_sets_go_in_pieces(replicas, rng):
    """A set of 40 MB is written and fetched in several requests, byte for byte."""
    one, other = replicas("one"), replicas("other")
    config = {"peft_type": "LORA", "r": 64, "target_modules": ["q_proj"]}
    tensors = {
        "base_model.model.q_proj.lora_A.weight": rng.standard_normal((64, 80_000), np.float32),
        "base_model.model.q_proj.lora_B.weight": rng.standard_normal((80_000, 64), np.float32),
    }
    files = {"adapter_config": json.dumps(config), "adapter_model": safetensors.encode(tensors)}
    assert one.put("/v1/sets/large", files=files).status_code == 201
    path = "/v1/sets/large/adapter_model.safetensors"
    assert other.get(path).content == one.get(path).content
    assert len(other.get(path).content) > 40e6


@pytest.mark.parametrize(
    ("store", "says"),
    [("s3://", "names no bucket"), ("s3:///prefix", "names no bucket")],
)
def test_a_url_without_a_bucket_does_not_start(weed, store, says, tmp_path):
    found = command(weed, "serve", "--store", store, "--cache", str(tmp_path / "c"), "--port", "0")
    assert found.returncode == 2
    assert says in found.stderr


def test_a_cache_of_a_different_bucket_does_not_start(weed, tmp_path, replicas, place):
    replicas("one")
    found = command(
        weed,
        *("serve", "--store", f"{place}-other", "--cache", str(tmp_path / "one"), "--port", "0"),
    )
    assert found.returncode == 2
    assert "different folder with --cache" in found.stderr
