import re
import threading
import time

import httpx
from conftest import TINY, assert_problem, serving, upload

from bonsai_lora.api.app import create_app
from bonsai_lora.core import backend


def test_health_and_readiness(client):
    assert client.get("/healthz").json() == {"status": "alive"}
    client.post("/v1/sets", json={"name": "s"})
    assert client.get("/readyz").json() == {
        "status": "ready",
        "sets": 1,
        "bad_files": {},
        "newer_files": [],
    }
    assert client.get("/docs").status_code == 200
    assert client.get("/openapi.json").json()["info"]["title"] == "Bonsai LoRA"


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

    monkeypatch.setattr(app.state.context.store, "read", fail)
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
