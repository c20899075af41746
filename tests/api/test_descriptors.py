"""Running out of file descriptors is a reason to retry, not a fault of the service."""

import contextlib
import resource

import pytest
from conftest import TINY, assert_problem, read_tensors, upload

_STANDARD_STREAMS = 3


@contextlib.contextmanager
def no_descriptors():
    """Let this process open no more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # All numbers below are in use, whatever threads in the background close meanwhile.
    resource.setrlimit(resource.RLIMIT_NOFILE, (_STANDARD_STREAMS, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/bases"),
        ("GET", "/v1/bases/tiny-qwen3"),
        ("POST", "/v1/sets"),
        ("DELETE", "/v1/sets/made"),
    ],
)
def test_a_request_that_needs_a_file_gets_503(based, method, path):
    based.post("/v1/sets", json={"name": "made"}).raise_for_status()
    body = {"name": "new"} if method == "POST" else None
    with no_descriptors():
        answer = based.request(method, path, json=body)
    assert_problem(answer, 503, "busy")
    assert answer.headers["retry-after"] == "1"
    assert [one["name"] for one in based.get("/v1/sets").json()["sets"]] == ["made"]


@pytest.mark.parametrize("path", ["/v1/sets", "/readyz", "/metrics", "/v1/stats"])
def test_a_listing_needs_a_file_only_at_first(client, store, path, monkeypatch):
    monkeypatch.setattr(store, "maintain", lambda: None)  # it would open the listing again
    client.post("/v1/sets", json={"name": "made"}).raise_for_status()
    with no_descriptors():
        assert client.get(path).status_code == 200
    store.listing._close()
    with no_descriptors():
        assert_problem(client.get(path), 503, "busy")
    assert client.get(path).status_code == 200


def test_an_apply_that_needs_the_base(based):
    """DoRA's norms are those of the base; the fast lane serves applies."""
    upload(based, "dora", TINY / "dora")
    tensors = read_tensors(TINY / "dora" / "adapter_model.safetensors")
    key = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    path = f"/v1/sets/dora/adapters/{module}/apply"
    width = len(tensors[key.replace("lora_A", "lora_B")])
    body = {"inputs": [1.0] * tensors[key].shape[1], "base_outputs": [0.5] * width}
    before = based.post(path, json=body)
    assert before.status_code == 200, before.text
    with no_descriptors():
        assert_problem(based.post(path, json=body), 503, "busy")
    assert based.post(path, json=body).text == before.text
