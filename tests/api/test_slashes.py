"""`%2F` in a path is part of a name, never a separator."""

import os
from pathlib import Path

import httpx
import pytest
from conftest import TINY, assert_problem, read_tensors, serving, upload

from bonsai_lora.api.app import create_app

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("slash", ["%2F", "%2f"])
def test_an_encoded_slash_separates_nothing(plain, slash):
    assert plain.get("/v1/sets/plain/stats").status_code == 200
    for method, path in (
        ("GET", f"/v1/sets/plain{slash}stats"),
        ("GET", f"/v1/sets/plain{slash}adapters{slash}{MODULE}"),
        ("DELETE", f"/v1/sets/x{slash}plain"),
    ):
        assert_problem(plain.request(method, path), 404, "set_not_found")
    width = read_tensors(TINY / "plain" / "adapter_model.safetensors")
    d_in = width[f"base_model.model.{MODULE}.lora_A.weight"].shape[1]
    body = {"inputs": [0.0] * d_in}
    for path in (f"/v1/sets/plain{slash}adapters/{MODULE}/apply", f"/v2{slash}models/plain/infer"):
        assert plain.post(path, json=body).status_code == 404
    assert plain.post(f"/v1/sets/plain/adapters/{MODULE}/apply", json=body).status_code == 200
    assert_problem(
        plain.post(f"/v1/sets/plain/adapters/a{slash}{MODULE}/apply", json=body),
        404,
        "module_not_found",
    )
    assert upload(plain, f"a{slash}b", TINY / "plain").status_code == 422
    assert [one["name"] for one in plain.get("/v1/sets").json()["sets"]] == ["plain"]


def test_a_file_in_a_folder_of_a_base_may_be_named_so(based, tmp_path):
    upload(based, "plain", TINY / "plain")
    folder = tmp_path / "bases" / "tiny-qwen3" / "more"
    folder.mkdir()
    (folder / "notes.json").write_text("[1]")
    for prefix in ("/v1/bases/tiny-qwen3/merged/plain", "/tiny-qwen3/plain/resolve/main"):
        for slash in ("/", "%2F"):
            answer = based.get(f"{prefix}/more{slash}notes.json")
            assert (answer.status_code, answer.text) == (200, "[1]"), answer.text


def test_other_encoded_characters_are_decoded(plain):
    assert plain.get("/v1/sets/%70lain").status_code == 200
    assert_problem(plain.get("/v1/sets/pl%20ain%2Fx"), 404, "set_not_found")


def test_a_region_may_have_a_slash_in_its_name(settings):
    memory = Path(f"/dev/shm/bonsai-slash-{os.getpid()}")
    memory.write_bytes(bytes(64))
    known = settings.model_copy(update={"shared_memory": True})
    try:
        with serving(create_app(known)) as url, httpx.Client(base_url=url) as client:
            path = "/v2/systemsharedmemory/region/a%2Fb"
            given = {"key": memory.name, "offset": 0, "byte_size": 64}
            assert client.post(f"{path}/register", json=given).status_code == 200
            regions = client.get("/v2/systemsharedmemory/status").json()
            assert [one["name"] for one in regions] == ["a/b"]
            assert client.get(f"{path}/status").json()[0]["name"] == "a/b"
            client.post(f"{path}/unregister")
            assert client.get("/v2/systemsharedmemory/status").json() == []
    finally:
        memory.unlink()
