import io
import itertools
import json
import logging
import math
import os
import re
import resource
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest
from conftest import TINY, assert_problem, connect, read_answer, serving, upload
from prometheus_client.parser import text_string_to_metric_families

from bonsai_lora.api.app import create_app
from bonsai_lora.cli.logs import configure_logging
from bonsai_lora.core import backend
from bonsai_lora.storage.bad_files import BadFiles
from bonsai_lora.storage.counts import count_restart
from bonsai_lora.storage.store import SetStore

ROOT = Path(__file__).parent.parent.parent


def test_health_and_readiness(client):
    assert client.get("/healthz").json() == {"status": "alive"}
    client.post("/v1/sets", json={"name": "s"})
    assert client.get("/readyz").json() == {
        "status": "ready",
        "sets": 1,
        "bad_files": {},
        "bad_file_count": 0,
        "newer_file_count": 0,
        "newer_files": [],
        "not_imported_count": 0,
        "not_imported": {},
        "store_writable": True,
        "bases_readable": None,
    }
    assert client.get("/docs").status_code == 200
    assert client.get("/openapi.json").json()["info"]["title"] == "Bonsai LoRA"


def test_readiness_reports_whether_the_bases_can_be_read(settings, tmp_path):
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    with serving(create_app(known)) as url:
        assert httpx.get(f"{url}/readyz").json()["bases_readable"] is False
        (tmp_path / "bases").mkdir()
        assert httpx.get(f"{url}/readyz").json()["bases_readable"] is True


def test_readiness_names_what_was_dropped_into_the_store(settings, tmp_path, monkeypatch):
    """At the start and while the service runs; what is dropped is never served."""
    store, log, root = tmp_path / "store", io.StringIO(), logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers)
    configure_logging("info", "json")
    root.handlers[0].setStream(log)
    shutil.copytree(TINY / "plain", store / "poet\nroot")
    with serving(create_app(settings)) as url:
        assert httpx.get(f"{url}/readyz").json()["not_imported_count"] == 1
        shutil.copytree(TINY / "plain", store / "sets" / "lawyer")
        ready = httpx.get(f"{url}/readyz").json()
        assert httpx.get(f"{url}/v1/sets").json()["sets"] == []
    assert ready["not_imported_count"] == 2
    assert list(ready["not_imported"]) == ["poet\\nroot/", "sets/lawyer/"]
    assert "bonsai-lora push" in ready["not_imported"]["sets/lawyer/"]
    [line] = [json.loads(one) for one in log.getvalue().splitlines() if "not imported" in one]
    assert (line["count"], line["names"]) == (1, ["poet\\nroot/"])


def test_metrics_count_requests(client):
    upload(client, "plain", TINY / "plain")
    path = "/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj"
    client.post(f"{path}/apply", json={"inputs": [[0.0] * 64] * 3})
    client.post(
        f"{path}/merge?dtype=F32",
        content=bytes(128 * 64 * 4),
        headers={"Content-Type": "application/octet-stream"},
    )
    client.get("/nothing/here")
    time.sleep(0.05)
    text = client.get("/metrics").text
    values = dict(re.findall(r"^(bonsai_lora_[^ #]+) ([\d.e+]+)$", text, re.MULTILINE))
    route = 'route="/v1/sets/{set}/adapters/{module}/apply"'
    assert values[f'bonsai_lora_requests_total{{method="POST",{route},status="200"}}'] == "1.0"
    assert values["bonsai_lora_rows_applied_total"] == "3.0"
    assert float(values["bonsai_lora_merged_bytes_total"]) == 128 * 64 * 4
    assert values["bonsai_lora_sets"] == "1.0"
    assert float(values["bonsai_lora_sets_bytes"]) == 83_968
    assert values['bonsai_lora_requests_total{method="any",route="none",status="404"}'] == "1.0"


def samples(client):
    """The samples of `/metrics` by name and labels; fails if a line is not of the format."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (one.name, *sorted(one.labels.items())): one.value
        for family in families
        for one in family.samples
    }


def test_refusals_are_counted_by_code(client):
    before = len(samples(client))
    for _ in range(2):
        client.get("/v1/sets/none")
    client.get("/v1/sets?limit=x")
    client.post("/v1/sets/none/apply", json={"inputs": [1]})
    with connect(client) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n")
        assert read_answer(connection)[0] == 431
    time.sleep(0.05)
    found = samples(client)
    codes = {key[1][1]: value for key, value in found.items() if "refusals" in key[0]}
    assert codes == {"set_not_found": 3, "invalid_request": 1, "head_too_large": 1}
    assert len(found) > before


def test_latencies_are_counted_from_50_microseconds_to_10_minutes(client):
    client.get("/healthz")
    time.sleep(0.05)
    route = (("method", "GET"), ("route", "/healthz"))
    name = "bonsai_lora_request_seconds_bucket"
    found = samples(client)
    bounds = sorted(
        float(dict(key[1:])["le"]) for key in found if key[0] == name and route[1] in key
    )
    assert (bounds[0], bounds[-2], bounds[-1]) == (5e-5, 600, math.inf)
    assert all(b <= 3 * a for a, b in itertools.pairwise(bounds[:-1]))
    assert found[(name, ("le", "600.0"), *route)] == 1


def test_metrics_of_the_process_and_its_load(app, client):
    context = app.state.context
    pid = ("pid", str(os.getpid()))
    flight = "bonsai_lora_requests_in_flight"
    context.memory.reserve(1 << 20)
    with context.short.admit(), context.short.admit():
        found = samples(client)
    context.memory.release(1 << 20)
    assert found[(flight, ("lane", "short"))] == 2
    assert found[(flight, ("lane", "long"))] == 0
    assert found[("bonsai_lora_queued_work", ("lane", "long"))] == 0
    assert found[("bonsai_lora_reserved_bytes", ("resource", "memory"))] == 1 << 20
    total = context.memory.total_bytes
    assert found[("bonsai_lora_budget_bytes", ("resource", "memory"))] == total
    after = samples(client)
    assert after[(flight, ("lane", "short"))] == 0
    assert after[("bonsai_lora_reserved_bytes", ("resource", "memory"))] == 0
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert found[("process_resident_memory_bytes", pid)] == pytest.approx(rss, rel=0.2)
    assert found[("process_cpu_seconds_total", pid)] == pytest.approx(time.process_time(), rel=0.2)
    assert found[("process_open_fds", pid)] > 3
    budget = app.state.context.limits.memory_budget_bytes
    assert found[("bonsai_lora_sets_budget_bytes",)] == budget


def test_every_metric_is_documented(client):
    table = (
        (ROOT / "docs/operations.md").read_text().partition("| metric |")[2].partition("\n\n")[0]
    )
    documented = set(re.findall(r"`((?:bonsai_lora|process)_\w+)`", table))
    declared = re.findall(r"^# TYPE (\w+) ", client.get("/metrics").text, re.MULTILINE)
    assert documented == set(declared)


def test_restarts_and_bad_files_are_counted(settings, tmp_path):
    (tmp_path / "shared").mkdir()
    with (
        serving(create_app(settings, tmp_path / "shared")) as url,
        httpx.Client(base_url=url) as client,
    ):
        assert samples(client)[("bonsai_lora_worker_restarts_total",)] == 0
        count_restart(tmp_path / "shared")
        count_restart(tmp_path / "shared")
        (tmp_path / "store" / "sets" / "broken.safetensors").write_bytes(b"no set")
        found = samples(client)
        assert found[("bonsai_lora_worker_restarts_total",)] == 2
        assert found[("bonsai_lora_bad_files",)] == 1
        assert found[("bonsai_lora_sets",)] == 0


def test_request_ids(client):
    given = client.get("/healthz", headers={"X-Request-Id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    made = {client.get("/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    hostile = client.get("/healthz", headers={"X-Request-Id": "a b\tc" * 50})
    assert re.fullmatch(r"[0-9a-f]{16}", hostile.headers["x-request-id"])


def test_hot_routes_have_ids_too(client):
    upload(client, "plain", TINY / "plain")
    path = "/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj/apply"
    headers = {"X-Request-Id": "abc-123"}
    answer = client.post(path, json={"inputs": [0.5] * 64}, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "abc-123")
    assert client.post(path, json={"inputs": [0.5] * 64}).headers["x-request-id"] != "abc-123"


def test_the_frameworks_errors_are_problems(client):
    assert_problem(client.get("/nothing"), 404, "not_found")
    answer = client.post("/v1/sets/x")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PATCH, PUT"
    answer = client.post("/healthz")
    assert_problem(answer, 405, "method_not_allowed")
    assert_problem(client.get("/v1/sets?limit=x"), 422, "invalid_request")


def test_an_unexpected_error_shows_no_internals(app, client, monkeypatch):
    def fail(_name):
        raise RuntimeError("secret")

    monkeypatch.setattr(app.state.store, "read_quickly", fail)
    answer = client.get("/v1/sets/x")
    assert_problem(answer, 500, "internal_error")
    assert "secret" not in answer.text


def test_overload_is_refused_immediately(settings):
    tight = settings.model_copy(update={"max_concurrency": 1})
    with serving(create_app(tight)) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s"})
        client.put("/v1/sets/s/adapters/m", json={"d_in": 2, "d_out": 2})
        path = "/v1/sets/s/adapters/m/apply"
        client.post(path, json={"inputs": [1, 2]})  # later ones are over at once
        release = threading.Event()

        def slow_body():
            yield b'{"inputs":' + b" " * (1 << 17)  # long: it has a place before it is complete
            release.wait(20)
            yield b"[1,2]}"

        holder = threading.Thread(
            target=lambda: client.post(
                path, content=slow_body(), headers={"Content-Type": "application/json"}
            )
        )
        holder.start()
        try:
            deadline = time.monotonic() + 10
            while (refused := client.post(path, json={"inputs": [1, 2]})).status_code == 200:
                assert time.monotonic() < deadline
            assert_problem(refused, 503, "busy")
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/healthz").status_code == 200
        finally:
            release.set()
            holder.join()
        assert client.post(path, json={"inputs": [1, 2]}).status_code == 200


def test_metrics_report_versions_and_work(app, client):
    text = client.get("/metrics").text
    kernels = "off" if backend.running() is None else "on"
    info = f'{{fast_lane="on",kernels="{kernels}",version="{app.version}"}}'
    assert f"bonsai_lora_info{info} 1.0" in text


def test_readiness_is_looked_up_in_a_thread_and_names_a_thousand_files(settings, monkeypatch):
    app = create_app(settings)
    store, threads = app.state.store, set()
    bad = store.root / "bad"
    bad.mkdir()
    for number in range(1005):
        (bad / f"s{number}.00000000.reason").write_text("cut off")
    looked_at = [(SetStore, "is_writable"), (SetStore, "newer_files")]
    for kind, name in [*looked_at, (BadFiles, "reasons"), (BadFiles, "count")]:
        original = getattr(kind, name)

        def noted(*arguments, original=original):
            threads.add(threading.current_thread().name)
            return original(*arguments)

        monkeypatch.setattr(kind, name, noted)
    with serving(app) as url:
        ready = httpx.get(f"{url}/readyz").json()
    assert ready["bad_file_count"] == 1005
    assert len(ready["bad_files"]) == 1000
    assert {name.partition(" ")[0] for name in threads} == {"AnyIO"}
