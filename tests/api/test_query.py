"""Every route: its HEAD, and what it does with a query parameter that it does not have."""

from urllib.parse import urlencode

import pytest
from conftest import TINY, assert_problem, upload
from fastapi.routing import APIRoute

NAMES = {
    "set": "plain",
    "base": "tiny-qwen3",
    "module": "model.layers.0.self_attn.q_proj",
    "filename": "model.safetensors",
    "job": "0" * 28,
}
OF_PEERS = ("/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths of OpenAI's and vLLM's API, whose clients may send more."""


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_an_unknown_query_parameter_is_refused_on_every_route_of_v1(app, client, method):
    upload(client, "plain", TINY / "plain")
    checked = 0
    for route in app.state.routes:
        if not isinstance(route, APIRoute) or method not in route.methods:
            continue
        if not route.path.startswith("/v1") or route.path in OF_PEERS:
            continue
        path = route.path.replace(":path", "").format_map(NAMES)
        answer = client.request(method, path, params={"unknown": "1"})
        if method == "HEAD":
            assert answer.status_code == 422, path
        else:
            problem = assert_problem(answer, 422, "invalid_request")
            assert problem["got"] == "unknown", path
        checked += 1
    assert checked >= 2
    assert client.get("/v1/sets/plain").json()["version"] == 1


def test_a_misspelled_parameter_is_not_ignored(client):
    answer = client.get("/v1/sets", params={"limits": "2"})
    problem = assert_problem(answer, 422, "invalid_request")
    assert problem["expected"] == ["limit", "cursor", "base_model_name", "prefix"]


def test_clients_of_other_protocols_may_send_more(client):
    upload(client, "plain", TINY / "plain")
    for path in ("/v2/models/plain", "/api/models/adapters/plain", "/healthz", "/v1/models"):
        assert client.get(path, params={"unknown": "1"}).status_code == 200


def test_every_get_has_its_head(app, based):
    upload(based, "plain", TINY / "plain")
    module = next(iter(based.get("/v1/sets/plain").json()["modules"]))["name"]
    file = based.get("/v1/bases/tiny-qwen3/merged/plain").json()["files"][0]["name"]
    names = NAMES | {"module": module, "filename": file, "owner": "adapters", "name": "plain"}
    names |= {"revision": "main", "path": "adapter_config.json", "model": "plain", "version": "1"}
    names |= {"region": "none"}
    checked = 0
    for route in app.state.routes:
        if not isinstance(route, APIRoute) or "GET" not in route.methods:
            continue
        path = route.path.replace(":path", "").format_map(names)
        if path.startswith("/page/"):
            path = "/page/swagger-init.js"
        params = {"d_in": 1, "d_out": 1, "rank": 1, "budget_bytes": 1} if "estimate" in path else {}
        answers = [
            based.request(method, path, params=params, follow_redirects=False)
            for method in ("GET", "HEAD")
        ]
        assert answers[0].status_code == answers[1].status_code, path
        assert answers[1].content == b"", path
        same = ("content-type", "etag", "location", "accept-ranges")
        for header in same:
            assert answers[0].headers.get(header) == answers[1].headers.get(header), path
        if answers[0].status_code < 400 and path not in ("/metrics", "/v1/stats"):
            assert answers[0].headers.get("content-length") == answers[1].headers.get(
                "content-length"
            ), path
        checked += 1
    assert checked > 30


NO_NUMBERS = ["1_0", "\u0661", " 1", "0x1", "1e", "nan", "inf", "1e999", "", "1,5", "--1"]


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("POST", "/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj/apply", "scale"),
        ("GET", "/v1/sets", "limit"),
        ("GET", "/v1/sets/plain/stats", "base_param_count"),
        ("GET", "/v1/estimate?d_in=1&d_out=1&rank=1", "budget_bytes"),
        ("GET", "/v1/bases/tiny-qwen3/merged/plain", "scale"),
        ("GET", "/v1/bases/tiny-qwen3/merged/plain?set=other", "weight"),
        ("PUT", "/v1/sets/plain/adapters/q_proj", "alpha"),
    ],
)
def test_only_decimal_numbers_are_numbers(based, method, path, name):
    upload(based, "plain", TINY / "plain")
    path += "&" if "?" in path else "?"
    for text in NO_NUMBERS:
        answer = based.request(method, path + urlencode({name: text}), json={})
        problem = assert_problem(answer, 422, "invalid_request")
        assert name in problem["detail"], text


def test_decimal_numbers_are_numbers(client):
    upload(client, "plain", TINY / "plain")
    path = "/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj/apply"
    inputs = {"inputs": [0.5] * 64}
    once = client.post(path, json=inputs).json()["outputs"]
    for text in ("2", "+2", "2.", "0.2e1", "20E-1"):
        twice = client.post(f"{path}?{urlencode({'scale': text})}", json=inputs).json()["outputs"]
        assert twice == pytest.approx([2 * one for one in once], rel=1e-6), text
