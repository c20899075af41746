"""GGUF LoRA files over HTTP."""

import gguf_files
import numpy as np
import pytest
from conftest import TINY, assert_problem, peft_config, peft_tensors, upload, upload_parts

PATH = "/v1/sets/plain/adapter.gguf"


def put(client, raw, path="/v1/sets/back"):
    return client.put(path, files={"adapter_gguf": raw})


def deltas(client, name):
    return {
        one["name"]: one["delta_norm"]
        for one in client.get(f"/v1/sets/{name}/stats").json()["modules"]
    }


@pytest.mark.parametrize("adapter", ["plain", "rslora-patterns"])
def test_there_and_back_is_the_same_delta(based, adapter):
    upload(based, adapter, TINY / adapter)
    raw = based.get(f"/v1/sets/{adapter}/adapter.gguf").content
    answer = put(based, raw)
    assert answer.status_code == 201, answer.text
    assert answer.json()["origin"] == "gguf"
    assert answer.json()["warnings"] == answer.json()["ignored_keys"] == []
    found, expected = deltas(based, "back"), deltas(based, adapter)
    assert found == pytest.approx(expected, rel=1e-6)
    again = based.put("/v1/sets/named", files={"adapter.gguf": raw})
    assert again.status_code == 201


def test_ranges_tags_and_head(based):
    upload(based, "plain", TINY / "plain")
    whole = based.get(PATH)
    assert whole.headers["accept-ranges"] == "bytes"
    assert based.head(PATH).headers["content-length"] == str(len(whole.content))
    part = based.get(PATH, headers={"Range": "bytes=1000-9999", "If-Range": whole.headers["etag"]})
    assert part.status_code == 206
    assert part.content == whole.content[1000:10000]
    assert based.get(PATH, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    tags = {based.head(f"{PATH}?dtype={one}").headers["etag"] for one in ("F32", "F16", "Q8_0")}
    assert len(tags) == 3
    assert whole.headers["etag"] in tags


def test_the_architecture_must_be_known(client, rng):
    upload_parts(client, "plain", peft_config(), peft_tensors(rng))
    assert_problem(client.get(PATH), 422, "invalid_request")
    assert "architecture=" in client.get(PATH).json()["detail"]
    assert_problem(client.get(f"{PATH}?architecture=mamba"), 422, "invalid_request")
    assert client.get(f"{PATH}?architecture=qwen3").status_code == 200
    client.patch("/v1/sets/plain", json={"base_model_name": "Qwen/Qwen3-8B"})
    assert client.get(PATH).status_code == 200
    assert_problem(client.get(f"{PATH}?folded=true"), 422, "unsupported_adapter")


def test_refused_uploads_change_nothing(client, rng):
    upload_parts(client, "plain", peft_config(), peft_tensors(rng))
    raw = client.get(f"{PATH}?architecture=qwen3").content
    model = gguf_files.file_of(
        {"general.architecture": "qwen3"}, {"a": ("F32", (1,), np.zeros(1, "<f4").tobytes())}
    )
    assert_problem(put(client, model), 422, "unsupported_adapter")
    assert "is a model" in put(client, model).json()["detail"]
    assert_problem(put(client, raw[:-64]), 400, "malformed_gguf")
    assert_problem(put(client, b""), 400, "malformed_gguf")
    two = {"adapter_gguf": raw, "adapter_config": b"{}"}
    assert_problem(client.put("/v1/sets/back", files=two), 400, "malformed_multipart")
    assert_problem(client.get("/v1/sets/back"), 404, "set_not_found")


def test_dora_is_refused(based):
    upload(based, "dora", TINY / "dora")
    answer = based.get("/v1/sets/dora/adapter.gguf")
    assert_problem(answer, 422, "unsupported_adapter")
    assert "DoRA" in answer.json()["detail"]
