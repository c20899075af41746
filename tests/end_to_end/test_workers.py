"""Several worker processes over one store: they agree at once, and survive being killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import TINY, upload
from test_command import running, workers_of

from bonsai_lora.storage.store import SetStore


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    with running("--workers", "3", "--store", str(store)) as (url, _):
        wait_until_ready(url)
        yield url


def wait_until_ready(url):
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/readyz").raise_for_status()
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def fresh(url, path, method="GET", **options):
    """A request on its own connection, so that any worker may serve it."""
    return httpx.request(method, url + path, timeout=30, **options)


def test_every_worker_sees_changes_immediately(workers):
    for round_ in range(5):
        assert fresh(workers, "/v1/sets", "POST", json={"name": "a"}).status_code == 201
        for version in range(2, 12):
            body = {"d_in": 4, "d_out": version}
            answer = fresh(workers, "/v1/sets/a/adapters/m", "PUT", json=body)
            assert answer.status_code in (200, 201), answer.text
            for _ in range(4):
                got = fresh(workers, "/v1/sets/a").json()
                assert got["version"] == version, round_
                assert got["modules"][0]["d_out"] == version
        assert fresh(workers, "/v1/sets/a", "DELETE").status_code == 204
        for _ in range(6):
            assert fresh(workers, "/v1/sets/a").status_code == 404


def test_writers_are_serialized_across_workers(workers):
    fresh(workers, "/v1/sets", "POST", json={"name": "w"})
    codes = []

    def write(index):
        body = {"d_in": 2, "d_out": 2}
        path = f"/v1/sets/w/adapters/m{index}"
        codes.append(fresh(workers, path, "PUT", json=body).status_code)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [201] * 24
    info = fresh(workers, "/v1/sets/w").json()
    assert info["version"] == 25
    assert info["adapter_count"] == 24


def test_if_match_holds_across_workers(workers):
    fresh(workers, "/v1/sets", "POST", json={"name": "m"})
    etag = fresh(workers, "/v1/sets/m").headers["etag"]
    codes = []

    def write(index):
        answer = fresh(
            workers,
            f"/v1/sets/m/adapters/m{index}",
            "PUT",
            json={"d_in": 2, "d_out": 2},
            headers={"If-Match": etag},
        )
        codes.append(answer.status_code)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [201] + [412] * 8


def test_each_worker_reports_the_metrics_of_all(workers):
    for _ in range(30):
        fresh(workers, "/v1/estimate?d_in=1&d_out=1&rank=1&budget_bytes=1")
    seen = set()
    for _ in range(6):
        text = fresh(workers, "/metrics").text
        found = re.search(r'requests_total{[^}]*route="/v1/estimate"[^}]*} ([\d.]+)', text)
        seen.add(found[1])
    assert seen == {"30.0"}


def test_each_worker_reports_the_process_figures_of_all(workers):
    pattern = r'^process_resident_memory_bytes{pid="(\d+)"} ([\d.e+]+)$'
    deadline = time.monotonic() + 30
    seen = 0
    while seen < 4:  # the others may be starting
        found = re.findall(pattern, fresh(workers, "/metrics").text, re.MULTILINE)
        assert len(found) <= 3
        assert all(float(size) > 2**20 for _, size in found)
        seen += len(found) == 3
        assert time.monotonic() < deadline


def test_load_of_a_killed_worker_is_no_longer_reported(tmp_path):
    flags = ("--workers", "2", "--work-memory-bytes", str(1 << 30), "--store", str(tmp_path))
    with running(*flags) as (url, _):
        before = wait_for_budgets_of_two(url, gone=None)
        os.kill(int(min(before)), signal.SIGKILL)
        wait_for_budgets_of_two(url, gone=min(before))


def wait_for_budgets_of_two(url, gone):
    """Wait until `/metrics` sums up two workers, without the process `gone`; return their ids."""
    deadline = time.monotonic() + 30
    while True:
        try:
            text = fresh(url, "/metrics").text
        except httpx.TransportError:  # a worker that starts, or is being killed
            text = ""
        pids = set(re.findall(r'^process_open_fds{pid="(\d+)"}', text, re.MULTILINE))
        if len(pids) == 2 and gone not in pids:
            budget = re.search(
                r'^bonsai_lora_budget_bytes{resource="memory"} (.+)$', text, re.MULTILINE
            )
            if float(budget[1]) == 2 << 30:
                return pids
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


CHILD = """
import sys
from pathlib import Path
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore

store = SetStore(Path(sys.argv[1]))
version = 0
while True:
    version += 1
    made = BonsaiLoraSet.new(LoraConfig(rank=version % 7 + 1, alpha=float(version)), "b", "s")
    made = made.add_mlp_adapters(64, 300)
    with store.lock("s"):
        try:
            previous = store.read_record("s")
        except Exception:
            previous = None
        store.write(NextVersion(lora_set=made, origin="initialized", previous=previous))
    print(version, flush=True)
"""


@pytest.mark.parametrize("round_", range(6))
def test_kill_9_at_any_moment_loses_nothing_acknowledged(tmp_path, round_):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        first = process.stdout.readline()
        time.sleep(0.05 + 0.037 * round_)
        process.send_signal(signal.SIGKILL)
        acknowledged = int(([first, *process.stdout.readlines()])[-1])
    store = SetStore(tmp_path)
    stored = store.read("s")
    # Acknowledged writes are there; one more may have been written but not acknowledged.
    assert stored.record.version in (acknowledged, acknowledged + 1)
    assert stored.record.config.alpha == stored.record.version
    assert stored.lora_set.registry.get("up_proj").rank == stored.record.version % 7 + 1
    assert np.isfinite(stored.lora_set.registry.get("up_proj").a_matrix).all()
    assert store.bad.reasons() == {}
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["s.safetensors"]


def test_workers_exit_with_their_supervisor(tmp_path):
    with running("--workers", "2", "--store", str(tmp_path)) as (url, process):
        wait_until_ready(url)
        process.kill()
        deadline = time.monotonic() + 20
        with pytest.raises(httpx.TransportError):
            while time.monotonic() < deadline:
                httpx.get(f"{url}/healthz")
                time.sleep(0.05)


def test_kill_9_of_the_service_during_an_upload(tmp_path):
    with running("--store", str(tmp_path)) as (url, process):
        client = httpx.Client(base_url=url)
        upload(client, "plain", TINY / "plain")

        def body():
            yield b'--x\r\nContent-Disposition: form-data; name="adapter_model"; filename="m"\r\n\r\n'
            yield (TINY / "plain" / "adapter_model.safetensors").read_bytes()[:5000]
            for pid in (process.pid, *workers_of(process)):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
            yield b"more"

        with pytest.raises(httpx.TransportError):
            client.put(
                "/v1/sets/plain",
                content=body(),
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )
        client.close()
    with running("--store", str(tmp_path)) as (url, _):
        info = httpx.get(f"{url}/v1/sets/plain").json()
        assert (info["version"], info["adapter_count"]) == (1, 14)
        assert httpx.get(f"{url}/readyz").json()["bad_files"] == {}


FILLER = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/core", sys.argv[2] + "/api"]
import httpx
from conftest import serving
from bonsai_lora.api.app import create_app
from bonsai_lora.settings import Settings

with serving(create_app(Settings(store=sys.argv[1]))) as url, httpx.Client(base_url=url) as client:
    first = client.post("/v1/sets", json={"name": "kept", "config": {"rank": 1}})
    client.put("/v1/sets/kept/adapters/m", json={"lora_A": [[1.0] * 50], "lora_B": [[1.0]] * 50})
    before = client.get("/v1/sets/kept").json()
    weights = {"lora_A": [[0.5] * 60_000] * 8, "lora_B": [[0.5] * 8] * 1000}
    full = client.put("/v1/sets/kept/adapters/big", json=weights)
    again = client.get("/v1/sets/kept").json()
    removed = client.delete("/v1/sets/kept")
    print(json.dumps([full.status_code, full.json().get("code"), before == again,
                      removed.status_code, list(map(str, Path(sys.argv[1], "tmp").iterdir()))]))
"""


def fill(store, **limits):
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(store), str(Path(__file__).parent.parent)],
        capture_output=True,
        text=True,
        timeout=60,
        **limits,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_full_disk_changes_nothing(tmp_path):
    """Fill a tmpfs of one megabyte, or reach a limit of file sizes if mounting is not allowed."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode == 0:
        try:
            result = fill(tmp_path)
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
    else:
        import resource

        cap = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
        result = fill(tmp_path, preexec_fn=cap)
    assert result == [507, "store_full", True, 204, []]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "sets").mkdir()
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission"):
        SetStore(tmp_path)


def test_a_read_only_store_serves_and_refuses_changes(tmp_path):
    """Remount the store read-only between two services; skipped if mounting is not allowed."""
    store = tmp_path / "store"
    SetStore(store)
    bound = subprocess.run(
        ["mount", "--bind", str(store), str(store)], capture_output=True, check=False
    )
    if bound.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with running("--store", str(store)) as (url, _):
            httpx.post(f"{url}/v1/sets", json={"name": "s"})
        subprocess.run(["mount", "-o", "remount,ro,bind", str(store)], check=True)
        with running("--store", str(store)) as (url, _):
            assert httpx.get(f"{url}/v1/sets/s").status_code == 200
            assert [one["name"] for one in httpx.get(f"{url}/v1/sets").json()["sets"]] == ["s"]
            ready = httpx.get(f"{url}/readyz").json()
            assert (ready["sets"], ready["store_writable"]) == (1, False)
            for answer in (
                httpx.post(f"{url}/v1/sets", json={"name": "t"}),
                httpx.delete(f"{url}/v1/sets/s"),
            ):
                assert answer.status_code == 503, answer.text
                assert answer.json()["code"] == "store_read_only"
            assert httpx.get(f"{url}/v1/sets/s").json()["version"] == 1
        with running("--store", str(store)) as (url, _):
            assert httpx.get(f"{url}/v1/sets/s").json()["version"] == 1
    finally:
        subprocess.run(["umount", str(store)], check=True)


def test_regions_and_statistics_are_those_of_all_workers(tmp_path):
    memory = Path(f"/dev/shm/bonsai-test-{os.getpid()}")
    x = np.arange(64, dtype=np.float32)
    memory.write_bytes(x.tobytes())
    flags = ("--workers", "3", "--store", str(tmp_path), "--shared-memory")
    try:
        with running(*flags) as (url, _):
            wait_until_ready(url)
            with httpx.Client(base_url=url) as client:
                upload(client, "plain", TINY / "plain")
            module = "model.layers.0.self_attn.q_proj"
            region = {"key": memory.name, "offset": 0, "byte_size": x.nbytes}
            path = "/v2/systemsharedmemory/region/r/register"
            assert fresh(url, path, "POST", json=region).status_code == 200
            place = {"shared_memory_region": "r", "shared_memory_byte_size": x.nbytes}
            given = {"name": module, "shape": [64], "datatype": "FP32", "parameters": place}
            answers = [
                fresh(url, "/v2/models/plain/infer", "POST", json={"inputs": [given]})
                for _ in range(24)
            ]
            assert {answer.status_code for answer in answers} == {200}
            assert len({answer.text for answer in answers}) == 1
            for _ in range(6):
                stats = fresh(url, "/v2/models/plain/stats").json()["model_stats"][0]
                assert stats["execution_count"] == stats["inference_count"] == 24
            fresh(url, "/v2/systemsharedmemory/unregister", "POST")
            for _ in range(6):
                answer = fresh(url, "/v2/models/plain/infer", "POST", json={"inputs": [given]})
                assert answer.status_code == 404
    finally:
        memory.unlink()
