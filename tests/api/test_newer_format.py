"""Sets that a newer release wrote: refused by name, reported, never touched."""

import httpx
import pytest
from conftest import (
    TINY,
    assert_problem,
    peft_config,
    peft_tensors,
    serving,
    snapshot,
    upload,
    upload_parts,
)
from test_records import change_record, record_of, with_keys

from bonsai_lora.api.app import create_app

MODULE = "model.layers.0.self_attn.q_proj"
NEW = "/v1/sets/new"


@pytest.fixture
def newer(client, store):
    """The sets `plain`, and `new`, whose file is one of format 2."""
    for name in ("plain", "new"):
        upload(client, name, TINY / "plain").raise_for_status()
    change_record(store.root / "sets" / "new.safetensors", with_keys(format=2))
    return client


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", NEW, {}),
        ("GET", f"{NEW}/stats", {}),
        ("GET", f"{NEW}/adapters", {}),
        ("GET", f"{NEW}/adapter_model.safetensors", {}),
        ("POST", f"{NEW}/adapters/{MODULE}/apply", {"json": {"inputs": [0.0] * 64}}),
        ("POST", "/v1/apply", {"json": {"module": MODULE, "sets": ["plain", "new"], "inputs": [[0.0] * 64] * 2}}),
        ("POST", f"{NEW}/adapters/{MODULE}/merge?dtype=F32", {"content": b"", "headers": {"Content-Type": "application/octet-stream"}}),
        ("POST", "/v1/sets", {"json": {"name": "new"}}),
        ("PUT", f"{NEW}/adapters/m", {"json": {"d_in": 2, "d_out": 2}}),
        ("DELETE", f"{NEW}/adapters/{MODULE}", {}),
        ("DELETE", NEW, {}),
    ],
)  # fmt: skip
def test_every_use_is_refused_and_nothing_changes(newer, store, method, path, options):
    before = snapshot(store)
    problem = assert_problem(newer.request(method, path, **options), 503, "newer_format")
    assert (problem["set"], problem["got"], problem["expected"]) == ("new", 2, 1)
    assert snapshot(store) == before
    assert not (store.root / "bad").exists()


def test_an_upload_does_not_replace_it(newer, store):
    before = snapshot(store)
    assert_problem(upload(newer, "new", TINY / "plain"), 503, "newer_format")
    assert snapshot(store) == before


def test_listings_leave_it_out_and_readiness_reports_it(newer):
    assert [one["name"] for one in newer.get("/v1/sets").json()["sets"]] == ["plain"]
    assert newer.get("/v1/stats").json()["set_count"] == 1
    assert newer.get("/readyz").json() == {
        "status": "ready",
        "sets": 1,
        "bad_files": {},
        "bad_file_count": 0,
        "newer_file_count": 1,
        "newer_files": ["new"],
        "not_imported_count": 0,
        "not_imported": {},
        "store_writable": True,
        "bases_readable": None,
    }
    metrics = newer.get("/metrics").text
    assert "\nbonsai_lora_newer_files 1.0\n" in metrics
    assert "\nbonsai_lora_sets 1.0\n" in metrics
    index = newer.post("/v2/repository/index").json()
    assert {one["name"] for one in index} == {"plain", "mixed"}
    assert newer.get("/api/models?author=adapters").json()[0]["id"] == "adapters/plain"


def test_the_other_protocols_refuse_it(newer):
    body = {"inputs": [{"name": MODULE, "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}
    answer = newer.post("/v2/models/new/infer", json=body)
    assert answer.status_code == 503
    assert "newer release" in answer.json()["error"]
    assert newer.get("/v2/models/new").status_code == 503
    answer = newer.get("/api/models/adapters/new")
    assert_problem(answer, 503, "newer_format")


def test_its_file_counts_against_the_memory_budget(settings, tmp_path, rng):
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        upload(client, "new", TINY / "plain").raise_for_status()
    path = tmp_path / "store" / "sets" / "new.safetensors"
    change_record(path, with_keys(format=2))
    room = path.stat().st_size + 100
    tight = settings.model_copy(update={"memory_budget_bytes": room})
    with serving(create_app(tight)) as url, httpx.Client(base_url=url) as client:
        answer = upload_parts(client, "more", peft_config(), peft_tensors(rng))
        problem = assert_problem(answer, 507, "memory_budget_exceeded")
        assert problem["held_bytes"] == path.stat().st_size
        path.unlink()
        answer = upload_parts(client, "more", peft_config(), peft_tensors(rng))
        assert answer.status_code == 201


def test_unknown_keys_survive_changes(client, store):
    upload(client, "plain", TINY / "plain").raise_for_status()
    path = store.root / "sets" / "plain.safetensors"
    change_record(path, with_keys(later={"a": [1]}))
    assert client.get("/v1/sets/plain").json()["version"] == 1
    client.put("/v1/sets/plain/adapters/m", json={"d_in": 2, "d_out": 2}).raise_for_status()
    assert record_of(path)["later"] == {"a": [1]}
    client.delete(f"/v1/sets/plain/adapters/{MODULE}").raise_for_status()
    assert record_of(path)["later"] == {"a": [1]}
    upload(client, "plain", TINY / "plain").raise_for_status()
    assert (record_of(path)["version"], record_of(path)["later"]) == (4, {"a": [1]})
    client.delete("/v1/sets/plain").raise_for_status()
    upload(client, "plain", TINY / "plain").raise_for_status()
    assert "later" not in record_of(path)
