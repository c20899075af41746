import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import reference
import safetensors.numpy
from conftest import (
    TINY,
    assert_problem,
    peft_config,
    peft_tensors,
    read_tensors,
    snapshot,
    upload,
    upload_parts,
)

from bonsai_lora.api.app import create_app
from bonsai_lora.core.kaiming import kaiming_uniform
from bonsai_lora.formats.gguf import read_header, reader_of
from bonsai_lora.settings import Settings

FULL = {
    "name": "my-adapter",
    "base_model_name": "bonsai-8b",
    "config": {"rank": 2, "alpha": 8.0, "dropout": 0.0, "target_modules": []},
    "attention": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    "mlp": {"hidden_size": 64, "intermediate_size": 160},
    "num_layers": 2,
}


def test_create_returns_location_etag_and_info(client, store):
    answer = client.post("/v1/sets", json=FULL)
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/sets/my-adapter"
    info = answer.json()
    assert info["version"] == 1
    assert info["origin"] == "initialized"
    assert info["adapter_count"] == len(info["modules"]) == 14
    assert info["total_memory_bytes"] == 4 * info["total_trainable_params"]
    assert info["modules"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "d_in": 64,
        "d_out": 128,
        "rank": 2,
        "alpha": 8.0,
        "scaling": 4.0,
        "param_count": 2 * (64 + 128),
        "memory_bytes": 8 * (64 + 128),
        "experts": None,
    }
    again = client.get("/v1/sets/my-adapter")
    assert again.json() == info
    assert again.headers["etag"] == answer.headers["etag"]
    stored = store.read("my-adapter").lora_set.registry.get("model.layers.0.self_attn.q_proj")
    assert np.array_equal(stored.a_matrix, kaiming_uniform(64, 128, 2))
    assert not stored.b_matrix.any()


def test_only_the_name_is_required(client):
    info = client.post("/v1/sets", json={"name": "empty"}).json()
    assert info["adapter_count"] == 0
    assert info["modules"] == []
    assert info["config"]["rank"] == 8
    assert len(info["config"]["target_modules"]) == 7


@pytest.mark.parametrize(
    ("model", "params"), [("qwen3-0.6b", 10_092_544 // 16), ("bonsai-1.7b", 17_432_576 // 16)]
)
def test_create_from_a_known_model(client, model, params):
    info = client.post("/v1/sets", json={"name": "m", "model": model, "config": {"rank": 1}}).json()
    assert info["total_trainable_params"] == params
    assert info["base_model_name"] == model
    assert info["adapter_count"] == 28 * 7


def test_the_linear_attention_of_bonsai_2_is_created_and_exported(client):
    config = {"rank": 1, "target_modules": []}
    body = {"name": "m", "model": "bonsai-2-4b", "num_layers": 4, "config": config}
    info = client.post("/v1/sets", json=body).json()
    assert info["adapter_count"] == 3 * 8 + 7
    raw = client.get("/v1/sets/m/adapter.gguf").content
    header = read_header(reader_of(raw), len(raw))
    assert header.architecture == "qwen35"
    assert header.tensors["blk.2.ssm_out.weight.lora_a"].shape == (1, 32 * 128)
    assert "blk.3.attn_q.weight.lora_a" in header.tensors


def test_target_modules_select_modules(client):
    body = FULL | {"config": {"rank": 1, "target_modules": ["q_proj", "down_proj"]}}
    info = client.post("/v1/sets", json=body).json()
    assert info["adapter_count"] == 4
    assert {one["name"].rpartition(".")[2] for one in info["modules"]} == {"q_proj", "down_proj"}


def test_a_second_create_is_refused(client, store):
    client.post("/v1/sets", json=FULL)
    before = snapshot(store)
    assert_problem(client.post("/v1/sets", json={"name": "my-adapter"}), 409, "set_exists")
    assert snapshot(store) == before


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"name": ""}, 422, "invalid_name"),
        ({"name": "a/b"}, 422, "invalid_name"),
        ({"name": ".."}, 422, "invalid_name"),
        ({"name": "x" * 97}, 422, "invalid_name"),
        ({"name": "ok\n"}, 422, "invalid_name"),
        ({"name": "stats"}, 422, "invalid_name"),
        ({"name": "mixed"}, 422, "invalid_name"),
        ({"name": 7}, 422, "invalid_request"),
        ({"nam": "x"}, 422, "invalid_request"),
        ({"config": {"rank": -1}}, 422, "invalid_request"),
        ({"config": {"rank": "8"}}, 422, "invalid_request"),
        ({"config": {"rank": 2.5}}, 422, "invalid_request"),
        ({"config": {"rank": 5000}}, 422, "rank_too_large"),
        ({"config": {"alpha": 1e39}}, 422, "invalid_request"),
        ({"config": {"dropout": 1.0}}, 422, "invalid_request"),
        ({"config": {"target_modules": ["nothing"]}}, 422, "invalid_request"),
        ({"model": "gpt-5"}, 422, "invalid_request"),
        ({"attention": None, "mlp": None}, 422, "invalid_request"),
        ({"num_layers": 0}, 422, "invalid_request"),
        ({"attention": {"hidden_size": 100, "num_heads": 8, "num_kv_heads": 2}}, 422, "invalid_request"),
        ({"attention": {"hidden_size": 2**31 - 1, "num_heads": 1}, "mlp": None}, 507, "memory_budget_exceeded"),
    ],
)  # fmt: skip
def test_invalid_requests_change_nothing(client, store, change, status, code):
    assert_problem(client.post("/v1/sets", json=FULL | change), status, code)
    assert snapshot(store) == {}


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "hint"),
    [
        ("POST", "/v1/sets", {"json": FULL | {"config": {"r": 8}}}, 422, "config.r is PEFT's name for 'rank'"),
        ("POST", "/v1/sets", {"json": FULL | {"config": {"lora_alpha": 8}}}, 422, "PEFT's name for 'alpha'"),
        ("PUT", "/v1/sets/s/adapters/q", {"json": {"d_in": 2, "d_out": 2, "config": {"r": 1}}}, 422, "'rank'"),
        ("PUT", "/v1/sets/s/adapters/q", {"json": {}}, 422, "d_in and d_out"),
        ("POST", "/v1/sets", {"files": {"adapter_config": b"{}"}}, 415, "PUT /v1/sets/{set}"),
        *(
            ("POST", "/v1/sets", {"content": b"", "headers": {"Content-Type": media}}, 415, "PUT /v1/sets/{set}")
            for media in (
                "application/vnd.safetensors",
                "application/octet-stream",
                "application/x-www-form-urlencoded",
            )
        ),
        ("PUT", "/v1/sets", {"files": {"adapter_config": b"{}"}}, 405, "PUT /v1/sets/{set}"),
        ("DELETE", "/v1/sets", {}, 405, "DELETE /v1/sets/{set}"),
    ],
)  # fmt: skip
def test_refusals_name_what_was_meant(client, store, method, path, sent, status, hint):
    client.post("/v1/sets", json={"name": "s"})
    before = snapshot(store)
    answer = client.request(method, path, **sent)
    assert answer.status_code == status
    assert hint in answer.json()["detail"]
    assert snapshot(store) == before


def test_list_pages_and_filters(client):
    for name, base in [("c", "x"), ("a", "x"), ("b", "y"), ("d", "x")]:
        client.post("/v1/sets", json={"name": name, "base_model_name": base})
    page = client.get("/v1/sets", params={"limit": 3}).json()
    assert [one["name"] for one in page["sets"]] == ["a", "b", "c"]
    assert "modules" not in page["sets"][0]
    rest = client.get("/v1/sets", params={"limit": 3, "cursor": page["next_cursor"]}).json()
    assert [one["name"] for one in rest["sets"]] == ["d"]
    assert rest["next_cursor"] is None
    filtered = client.get("/v1/sets", params={"base_model_name": "x", "limit": 3}).json()
    assert [one["name"] for one in filtered["sets"]] == ["a", "c", "d"]
    assert filtered["next_cursor"] is None
    assert len(client.get("/v1/sets?cursor=").json()["sets"]) == 4
    client.post("/v1/sets", json={"name": "cd", "base_model_name": "y"})
    for query, names in [
        ({"prefix": "c"}, ["c", "cd"]),
        ({"prefix": "c", "cursor": "c"}, ["cd"]),
        ({"prefix": "c", "base_model_name": "x"}, ["c"]),
        ({"prefix": "e"}, []),
        ({"prefix": "_%"}, []),
        ({"prefix": ""}, ["a", "b", "c", "cd", "d"]),
    ]:
        page = client.get("/v1/sets", params=query).json()
        assert ([one["name"] for one in page["sets"]], page["next_cursor"]) == (names, None)
    assert_problem(client.get("/v1/sets", params={"prefix": "x" * 97}), 422, "invalid_request")
    assert_problem(client.get("/v1/sets", params={"limit": 0}), 422, "invalid_request")
    for wrong in ("/", "a b", "x" * 97):
        refused = client.get("/v1/sets", params={"cursor": wrong})
        assert_problem(refused, 422, "invalid_request")
        assert "cursor" in refused.json()["detail"]


def test_unknown_sets_and_modules(client):
    client.post("/v1/sets", json=FULL)
    for path in ("nothing", "nothing/stats", "nothing/adapters", "stats"):
        assert_problem(client.get(f"/v1/sets/{path}"), 404, "set_not_found")
    body = assert_problem(client.get("/v1/sets/my-adapter/adapters/x"), 404, "module_not_found")
    assert "model.layers.0.self_attn.q_proj" in body["detail"]


def test_a_recreated_set_has_a_new_etag(client):
    first = client.post("/v1/sets", json={"name": "s"}).headers["etag"]
    assert client.delete("/v1/sets/s").status_code == 204
    assert_problem(client.get("/v1/sets/s"), 404, "set_not_found")
    assert_problem(client.delete("/v1/sets/s"), 404, "set_not_found")
    second = client.post("/v1/sets", json={"name": "s"})
    assert second.headers["etag"] != first
    assert second.json()["version"] == 1


def test_upload_reports_and_exports_what_came(client):
    answer = upload(client, "plain", TINY / "plain")
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/sets/plain"
    report = answer.json()
    assert report["origin"] == "peft"
    assert report["base_model_name"] == "tiny-qwen3"
    assert report["ignored_keys"] == []
    assert report["warnings"] == []
    tensors = read_tensors(TINY / "plain" / "adapter_model.safetensors")
    for module in report["modules"]:
        key = f"base_model.model.{module['name']}.lora_"
        delta = 2.0 * tensors[f"{key}B.weight"].astype(float) @ tensors[f"{key}A.weight"]
        assert module["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-9)
    config = client.get("/v1/sets/plain/adapter_config.json")
    assert config.json() == json.loads((TINY / "plain" / "adapter_config.json").read_text())
    exported = safetensors.numpy.load(
        client.get("/v1/sets/plain/adapter_model.safetensors").content
    )
    assert exported.keys() == tensors.keys()
    for key, array in tensors.items():
        assert np.array_equal(exported[key].view(np.uint32), array.view(np.uint32))


def test_an_export_can_be_uploaded_again(client):
    client.post("/v1/sets", json=FULL)
    module = "model.layers.1.mlp.up_proj"
    weights = {"lora_A": [[1.0] * 64], "lora_B": [[0.5]] * 160, "alpha": 3.0}
    assert client.put(f"/v1/sets/my-adapter/adapters/{module}", json=weights).status_code == 200
    files = {
        "adapter_config": client.get("/v1/sets/my-adapter/adapter_config.json").content,
        "adapter_model": client.get("/v1/sets/my-adapter/adapter_model.safetensors").content,
    }
    report = client.put("/v1/sets/copy", files=files).json()
    original = client.get("/v1/sets/my-adapter").json()
    by_name = {one["name"]: one for one in report["modules"]}
    for one in original["modules"]:
        got = by_name[one["name"]]
        assert {key: got[key] for key in one} == one


def test_export_ranges_head_and_conditions(client):
    upload(client, "plain", TINY / "plain")
    path = "/v1/sets/plain/adapter_model.safetensors"
    whole = client.get(path)
    head = client.head(path)
    assert head.headers["content-length"] == str(len(whole.content))
    assert head.headers["accept-ranges"] == "bytes"
    assert head.content == b""
    etag = whole.headers["etag"]
    part = client.get(path, headers={"Range": "bytes=8-99"})
    assert part.status_code == 206
    assert part.content == whole.content[8:100]
    assert part.headers["content-range"] == f"bytes 8-99/{len(whole.content)}"
    assert client.get(path, headers={"Range": "bytes=-5"}).content == whole.content[-5:]
    beyond = client.get(path, headers={"Range": f"bytes={len(whole.content)}-"})
    assert_problem(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    stale = client.get(path, headers={"Range": "bytes=0-1", "If-Range": '"old"'})
    assert stale.status_code == 200
    fresh = client.get(path, headers={"Range": "bytes=0-1", "If-Range": etag})
    assert fresh.status_code == 206
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 304
    several = client.get(path, headers={"Range": "bytes=0-3,10-12"})
    assert several.status_code == 206
    assert several.headers["content-type"].startswith("multipart/byteranges; boundary=")
    assert int(several.headers["content-length"]) == len(several.content)
    assert whole.content[10:13] in several.content


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"peft_type": "IA3"}, "unsupported_adapter", "IA3"),
        ({"peft_type": None}, "unsupported_adapter", "peft_type"),
        ({"alora_invocation_tokens": [1]}, "unsupported_adapter", "alora"),
        ({"layer_replication": [[0, 2]]}, "unsupported_adapter", "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "unsupported_adapter", "pissa"),
        ({"init_lora_weights": "olora"}, "unsupported_adapter", "olora"),
        ({"use_qalora": True}, "unsupported_adapter", "use_qalora"),
        ({"r": 5}, "invalid_adapter", "rank"),
        ({"r": 0}, "invalid_adapter", "r is 0"),
        ({"lora_alpha": "x"}, "invalid_adapter", "lora_alpha"),
        ({"rank_pattern": {"q_proj": 3}}, "invalid_adapter", "rank"),
        ({"rank_pattern": {"(": 4}}, "invalid_adapter", "regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "invalid_adapter", "alpha_pattern"),
        ({"target_modules": 7}, "invalid_adapter", "target_modules"),
    ],
)
def test_adapters_that_cannot_be_applied_exactly_are_refused(
    client, store, rng, change, code, word
):
    answer = upload_parts(client, "s", peft_config(**change), peft_tensors(rng))
    body = assert_problem(answer, 422, code)
    assert word in body["detail"]
    assert snapshot(store) == {}


def test_wrong_tensors_are_refused(client, store, rng):
    good = peft_tensors(rng)
    key_a, key_b = good
    other = np.zeros((4, 4), np.float32)
    cases = [
        ({}, "invalid_adapter"),
        ({key_a: good[key_a]}, "invalid_adapter"),
        (dict.fromkeys(good, np.zeros((0, 8), np.float32)), "invalid_adapter"),
        ({**good, "base_model.model.lm_head.scale": other}, "unsupported_adapter"),
        ({**good, key_a: good[key_a][:3]}, "invalid_adapter"),
        ({**good, key_b: np.full((5, 4), np.nan, np.float32)}, "invalid_adapter"),
        ({**good, key_a: good[key_a][None]}, "invalid_adapter"),
        ({**good, key_a: good[key_a].astype(np.float64)}, "unsupported_adapter"),
        ({**good, key_a.replace("lora_A.weight", "lora_A.default.weight"): good[key_a]}, "invalid_adapter"),
    ]  # fmt: skip
    for tensors, code in cases:
        assert_problem(upload_parts(client, "s", peft_config(), tensors), 422, code)
    assert snapshot(store) == {}


def test_rslora_and_patterns_follow_peft(client):
    report = upload(client, "rs", TINY / "rslora-patterns").json()
    by_name = {one["name"]: one for one in report["modules"]}
    q_proj = by_name["model.layers.0.self_attn.q_proj"]
    assert (q_proj["rank"], q_proj["alpha"], q_proj["scaling"]) == (4, 12.0, 6.0)
    down = by_name["model.layers.1.mlp.down_proj"]
    assert (down["rank"], down["scaling"]) == (16, 3.0)
    assert by_name["model.layers.0.mlp.down_proj"]["rank"] == 8
    assert by_name["model.layers.0.self_attn.v_proj"]["alpha"] == 24.0


@pytest.mark.parametrize(("ending", "alpha"), [("x", 3.0), ("y", 8.0)])
def test_a_pattern_that_takes_others_forever_is_matched(client, rng, ending, alpha):
    """Backtracking over it takes more than the age of the universe."""
    module = "a" * 200 + ending
    config = peft_config(
        alpha_pattern={"(a*)*(b*)*(.*.*)*(.*)*x": 3}, target_modules=[module], lora_alpha=8
    )
    answer = upload_parts(client, "s", config, peft_tensors(rng, module=f"model.{module}"))
    assert answer.status_code == 201, answer.text
    assert [one["alpha"] for one in answer.json()["modules"]] == [alpha]
    assert answer.elapsed.total_seconds() < 10


@pytest.mark.parametrize(("count", "accepted"), [(2, True), (20, False)])
def test_too_much_to_match_is_refused(client, store, rng, count, accepted):
    large = "".join(f"{letter}{{1000}}" for letter in "bcdefghijklmnop")
    modules = ["a" * 200 + f".m{number}" for number in range(32)]
    config = peft_config(
        alpha_pattern={f"{large}{number}": 3 for number in range(count)}, target_modules=modules
    )
    tensors = {}
    for module in modules:
        tensors |= peft_tensors(rng, module=module)
    answer = upload_parts(client, "s", config, tensors)
    assert answer.elapsed.total_seconds() < 10
    if accepted:
        assert answer.status_code == 201, answer.text
        return
    problem = assert_problem(answer, 422, "invalid_adapter")
    assert "alpha_pattern has too many or too large expressions" in problem["detail"]
    assert snapshot(store) == {}


@pytest.mark.parametrize(
    ("pattern", "accepted"),
    [("q_proj", True), ("(a*)*(b*)*(.*.*)*(.*)*x", True), ("x{5000000}", False), ("(?=q)q", False)],
)
def test_an_upload_gets_the_same_answer_under_load(client, rng, pattern, accepted):
    config = peft_config(alpha_pattern={pattern: 3}, target_modules=["a" * 200])
    tensors = peft_tensors(rng, module="model." + "a" * 200)

    def answers(count):
        for _ in range(count):
            answer = upload_parts(client, "s", config, tensors)
            body = answer.json()
            for changing in ("version", "created_at", "updated_at", "request_id"):
                body.pop(changing, None)
            yield answer.is_success, body

    [expected] = answers(1)
    assert expected[0] == accepted, expected
    busy = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    load = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(os.cpu_count() or 1)]
    try:
        assert list(answers(10)) == [expected] * 10
        assert all(process.poll() is None for process in load)
    finally:
        for process in load:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"adapter_config": "{}"}, "malformed_multipart"),
        ({"adapter_model": "x"}, "malformed_multipart"),
        ({"adapter_config": "{}", "adapter_model": "x", "more": "y"}, "malformed_multipart"),
    ],
)
def test_invalid_multipart_forms(client, store, files, code):
    assert_problem(client.put("/v1/sets/s", files=files), 400, code)
    assert snapshot(store) == {}


def test_uploads_that_are_not_multipart(client):
    text = client.put("/v1/sets/s", content=b"{}", headers={"Content-Type": "text/plain"})
    assert_problem(text, 415, "unsupported_media_type")
    assert_problem(client.put("/v1/sets/s", json={}), 422, "invalid_request")
    files = {"adapter_config": "nonsense", "adapter_model": safetensors.numpy.save({})}
    assert_problem(client.put("/v1/sets/s", files=files), 422, "invalid_adapter")
    files = {
        "adapter_config": json.dumps(peft_config()),
        "adapter_model": b"\x80\x02pickle" + b"x" * 9,
    }
    answer = client.put("/v1/sets/s", files=files)
    assert "safe_serialization=True" in assert_problem(answer, 422, "unsupported_adapter")["detail"]
    assert_problem(client.put("/v1/sets/bases", files=files), 422, "invalid_name")


def test_concurrent_creates_of_one_name_make_one_set(client):
    codes = []
    threads = [
        threading.Thread(
            target=lambda: codes.append(client.post("/v1/sets", json=FULL).status_code)
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [201] + [409] * 7


def test_a_restart_keeps_the_sets(client, settings, tmp_path):
    client.post("/v1/sets", json=FULL)
    etag = client.get("/v1/sets/my-adapter").headers["etag"]
    again = create_app(Settings(store=settings.store))
    record = again.state.store.read("my-adapter").record
    assert record.etag == etag


def test_an_upload_may_name_thousands_of_target_modules(client, rng):
    config = peft_config(target_modules=["q_proj", *(f"m{number}" for number in range(2000))])
    assert upload_parts(client, "many", config, peft_tensors(rng)).status_code == 201
    assert len(client.get("/v1/sets/many").json()["config"]["target_modules"]) == 2001


def test_a_path_where_a_file_was_meant(client, store, rng):
    """curl without the @."""
    good = {
        "adapter_config": json.dumps(peft_config()),
        "adapter_model": safetensors.numpy.save(peft_tensors(rng)),
    }
    for part, path in (
        ("adapter_config", "out/adapter_config.json"),
        ("adapter_model", "./adapter_model.safetensors"),
    ):
        answer = client.put("/v1/sets/s", files={**good, part: path})
        assert "@" in assert_problem(answer, 400, "malformed_multipart")["detail"]
        one = {key: value for key, value in good.items() if key != part}
        assert (
            part
            in assert_problem(client.put("/v1/sets/s", files=one), 400, "malformed_multipart")[
                "detail"
            ]
        )
    assert snapshot(store) == {}


def test_parts_may_be_named_after_the_files(client, rng):
    files = {
        "adapter_config.json": json.dumps(peft_config()),
        "adapter_model.safetensors": safetensors.numpy.save(peft_tensors(rng)),
    }
    assert client.put("/v1/sets/s", files=files).status_code == 201


def test_the_base_is_named_by_the_upload_the_query_or_later(client, rng):
    """The export says the same, whoever said it last."""
    config = peft_config(base_model_name_or_path="/home/me/model")

    def name_of(answer):
        exported = client.get("/v1/sets/s/adapter_config.json").json()
        assert exported["base_model_name_or_path"] == answer.json()["base_model_name"]
        assert exported["target_modules"] == ["q_proj"]
        return answer.json()["base_model_name"]

    assert name_of(upload_parts(client, "s", config, peft_tensors(rng))) == "/home/me/model"
    named = upload_parts(client, "s", config, peft_tensors(rng), params={"base_model_name": "a/b"})
    assert name_of(named) == "a/b"
    changed = client.patch(
        "/v1/sets/s", json={"base_model_name": "c"}, headers={"If-Match": named.headers["etag"]}
    )
    assert name_of(changed) == "c"
    assert changed.json()["version"] == 3
    assert changed.headers["etag"] == client.get("/v1/sets/s").headers["etag"]
    assert changed.json()["origin"] == "peft"
    old = client.patch(
        "/v1/sets/s", json={"base_model_name": "d"}, headers={"If-Match": named.headers["etag"]}
    )
    assert_problem(old, 412, "precondition_failed")
    assert_problem(client.patch("/v1/sets/s", json={"name": "t"}), 422, "invalid_request")
    missing = client.patch("/v1/sets/t", json={"base_model_name": "d"})
    assert_problem(missing, 404, "set_not_found")
    assert client.get("/v1/sets/s").json()["version"] == 3


def test_a_created_set_s_base_can_be_named(client):
    client.post("/v1/sets", json=FULL)
    assert client.patch("/v1/sets/my-adapter", json={"base_model_name": "x"}).status_code == 200
    config = client.get("/v1/sets/my-adapter/adapter_config.json").json()
    assert config["base_model_name_or_path"] == "x"


def test_an_mlx_adapter_is_taken_and_exported_as_peft(client, rng):
    module = "model.layers.0.self_attn.q_proj"
    lora_a = rng.standard_normal((6, 4)).astype(np.float32)
    lora_b = rng.standard_normal((4, 5)).astype(np.float32)
    config = {
        "fine_tune_type": "lora",
        "model": "mlx-community/Qwen3-8B-4bit",
        "num_layers": 8,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
    }
    tensors = {f"{module}.lora_a": lora_a, f"{module}.lora_b": lora_b}
    report = upload_parts(client, "m", config, tensors).json()
    assert report["origin"] == "mlx"
    assert report["base_model_name"] == "mlx-community/Qwen3-8B-4bit"
    x = rng.standard_normal((3, 6)).astype(np.float32)
    answer = client.post(f"/v1/sets/m/adapters/{module}/apply", json={"inputs": x.tolist()})
    expected = 20.0 * (x.astype(np.float64) @ lora_a @ lora_b)
    assert reference.relative_error(np.array(answer.json()["outputs"]), expected) < 1e-6
    exported = safetensors.numpy.load(client.get("/v1/sets/m/adapter_model.safetensors").content)
    prefix = f"base_model.model.{module}"
    assert exported[f"{prefix}.lora_A.weight"].tobytes() == lora_a.T.tobytes()
    assert exported[f"{prefix}.lora_B.weight"].tobytes() == lora_b.T.tobytes()
    again = client.get("/v1/sets/m/adapter_config.json").json()
    assert (again["peft_type"], again["r"], again["lora_alpha"]) == ("LORA", 4, 80.0)
    assert upload_parts(client, "p", again, exported).json()["modules"] == report["modules"]
