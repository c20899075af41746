"""The laboratory over HTTP: combine, compare, spectrum; refusals change nothing."""

import json
import time

import httpx
import numpy as np
import pytest
from conftest import (
    DATA,
    TINY,
    assert_problem,
    peft_config,
    peft_tensors,
    read_tensors,
    serving,
    snapshot,
    upload,
    upload_parts,
)
from keyring import KeysFileMaker, caller
from reference import delta_weight, relative_error

from bonsai_lora.api.app import create_app
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.recipe import OPTIONS
from bonsai_lora.formats import safetensors
from bonsai_lora.service.combine import Plan
from bonsai_lora.settings import Settings
from bonsai_lora.storage.newset import NextVersion

MODULE = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def pair(client, rng):
    """Sets `a` (rank 4, scaling 2) and `b` (rank 3, rsLoRA, one module more)."""
    upload_parts(client, "a", peft_config(base_model_name_or_path="base"), peft_tensors(rng))
    config = peft_config(r=3, use_rslora=True, base_model_name_or_path="base")
    tensors = peft_tensors(rng, rank=3) | peft_tensors(rng, OTHER, rank=3)
    assert upload_parts(client, "b", config, tensors).status_code == 201
    return client


def deltas(store, name):
    """The deltas of a set by module, as float64."""
    return {
        module: delta_weight(one.a_matrix, one.b_matrix, one.scaling)
        for module, one in store.read(name).lora_set.registry.adapters.items()
    }


def combine(client, *sets, query="", **options):
    parts = [{"set": name, "weight": weight} for name, weight in sets]
    return client.post(f"/v1/combine{query}", json={"name": "new", "sets": parts, **options})


def test_sets_without_modules_make_one_without_modules(client, store):
    for name in ("a", "b"):
        client.post("/v1/sets", json={"name": name, "config": {"target_modules": []}})
    answer = combine(client, ("a", 1), ("b", 1), query="?dry_run=true", method="svd")
    report = {"method": "svd", "rank": 0, "energy_kept": 1, "relative_error": 0, "warnings": []}
    assert answer.json() == {**report, "modules": []}
    assert combine(client, ("a", 1), ("b", 1), method="svd").status_code == 201
    assert deltas(store, "new") == {}
    assert client.get("/v1/compare?set=a&set=b").json()["modules"] == []


def test_exact(pair, store):
    response = combine(pair, ("a", 0.5), ("b", -2))
    assert response.status_code == 201
    made = response.json()
    assert response.headers["location"] == "/v1/sets/new"
    assert response.headers["etag"] == pair.get("/v1/sets/new").headers["etag"]
    assert (made["origin"], made["base_model_name"], made["version"]) == ("combined", "base", 1)
    assert {one["name"]: one["rank"] for one in made["modules"]} == {MODULE: 7, OTHER: 3}
    report = made["report"]
    assert (report["method"], report["rank"]) == ("exact", 7)
    assert (report["energy_kept"], report["relative_error"]) == (1.0, 0.0)
    assert report["warnings"] == [
        "1 of 2 modules are not in all sets; a missing one counts as zero"
    ]
    a, b = deltas(store, "a"), deltas(store, "b")
    got = deltas(store, "new")
    assert relative_error(got[MODULE], 0.5 * a[MODULE] - 2 * b[MODULE]) < 1e-6
    assert relative_error(got[OTHER], -2 * b[OTHER]) < 1e-6
    x = np.ones((1, 6), np.float32).tolist()
    applied = pair.post(f"/v1/sets/new/adapters/{MODULE}/apply", json={"inputs": x}).json()
    np.testing.assert_allclose(applied["outputs"], got[MODULE].sum(axis=1)[None], rtol=1e-5)


def test_a_dry_run_stores_nothing_and_reports_the_same(pair, store):
    before = snapshot(store)
    dry = combine(pair, ("a", 1), ("b", 1), query="?dry_run=true", method="svd", energy=0.9)
    assert dry.status_code == 200
    assert "location" not in dry.headers
    assert snapshot(store) == before
    made = combine(pair, ("a", 1), ("b", 1), method="svd", energy=0.9).json()
    assert dry.json() == made["report"]
    assert 0.9 <= made["report"]["energy_kept"] < 1
    for module in made["report"]["modules"]:
        assert module["energy_kept"] >= 0.9
        assert module["relative_error"] == pytest.approx((1 - module["energy_kept"]) ** 0.5)


def test_svd_has_the_highest_rank_of_the_sets_unless_told(pair, store):
    ranks = [
        one["rank"] for one in combine(pair, ("a", 1), ("b", 1), method="svd").json()["modules"]
    ]
    assert ranks == [4, 3]
    total = deltas(store, "a")[MODULE] + deltas(store, "b")[MODULE]
    u, values, vt = np.linalg.svd(total, full_matrices=False)
    best = (u[:, :4] * values[:4]) @ vt[:4]
    assert relative_error(deltas(store, "new")[MODULE], best) < 1e-6


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_makes_a_set_that_peft_files_carry(client, store, rng, method):
    for name in ("a", "b"):
        upload_parts(client, name, peft_config(), peft_tensors(rng, d_in=20, d_out=16))
    has_density = "density" in OPTIONS[method]
    options = {"density": 0.5} if has_density else {}
    made = combine(client, ("a", 0.6), ("b", 0.4), method=method, **options)
    assert made.status_code == 201, made.text
    config = client.get("/v1/sets/new/adapter_config.json").json()
    tensors = client.get("/v1/sets/new/adapter_model.safetensors").content
    files = {"adapter_config": json.dumps(config), "adapter_model": tensors}
    assert client.put("/v1/sets/again", files=files).status_code == 201
    got, again = deltas(store, "new"), deltas(store, "again")
    assert np.abs(got[MODULE]).max() > 0
    np.testing.assert_array_equal(got[MODULE], again[MODULE])


def test_the_seed_decides(client, store, rng):
    upload_parts(client, "a", peft_config(), peft_tensors(rng, d_in=20, d_out=16))
    options = {"method": "dare_linear_svd", "density": 0.5}
    found = []
    for seed in (1, 1, 2):
        assert combine(client, ("a", 1), seed=seed, **options).status_code == 201
        found.append(deltas(store, "new")[MODULE])
        client.delete("/v1/sets/new")
    assert np.array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2])


def test_fused_experts(client, store):
    folder = DATA / "moe"
    names = sorted(one.name for one in folder.iterdir() if (one / "adapter_config.json").is_file())
    assert names
    for name in names:
        assert upload(client, "moe", folder / name).status_code in (200, 201)
        made = combine(client, ("moe", 0.5), ("moe", 0.25))
        assert made.status_code == 201, made.text
        before = store.read("moe").lora_set.registry.adapters
        after = store.read("new").lora_set.registry.adapters
        for module, one in before.items():
            for ours, theirs in zip(one.each_expert, after[module].each_expert, strict=True):
                expected = 0.75 * delta_weight(ours.a_matrix, ours.b_matrix, ours.scaling)
                got = delta_weight(theirs.a_matrix, theirs.b_matrix, theirs.scaling)
                assert relative_error(got, expected) < 1e-6
        config = client.get("/v1/sets/new/adapter_config.json").content
        tensors = client.get("/v1/sets/new/adapter_model.safetensors").content
        files = {"adapter_config": config, "adapter_model": tensors}
        assert client.put("/v1/sets/again", files=files).status_code in (200, 201)
        again = store.read("again").lora_set.registry.adapters
        for module, one in after.items():
            assert again[module].experts == one.experts
            assert again[module].scaling == one.scaling
            np.testing.assert_array_equal(again[module].b_matrix, one.b_matrix)
        client.delete("/v1/sets/new")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"name": "a"}, 409, "set_exists"),
        ({"name": "a/b"}, 422, "invalid_name"),
        ({"sets": [{"set": "absent"}]}, 404, "set_not_found"),
        ({"sets": []}, 422, "invalid_request"),
        ({"sets": [{"set": "a"}] * 65}, 422, "invalid_request"),
        ({"sets": [{"set": "a", "weight": 1e31}]}, 422, "invalid_request"),
        ({"sets": [{"set": "a", "weight": 1e30}] * 2}, 422, "non_finite_output"),
        ({"method": "average"}, 422, "invalid_request"),
        ({"rank": 3}, 422, "invalid_request"),
        ({"method": "svd", "rank": 3, "energy": 0.5}, 422, "invalid_request"),
        ({"method": "svd", "rank": 1025}, 422, "rank_too_large"),
        ({"method": "ties"}, 422, "invalid_request"),
        ({"method": "linear"}, 422, "invalid_request"),  # ranks 4 and 3
        ({"method": "slerp", "sets": [{"set": "a"}]}, 422, "invalid_request"),
        ({"sets": [{"set": "a"}, {"set": "wide"}]}, 422, "shape_mismatch"),
    ],
)
def test_refusals_change_nothing(pair, store, rng, change, status, code):
    upload_parts(pair, "wide", peft_config(), peft_tensors(rng, d_in=8))
    body = {"name": "new", "sets": [{"set": "a"}, {"set": "b"}], **change}
    if code == "non_finite_output":
        tensors = {name: one * np.float32(1e10) for name, one in peft_tensors(rng).items()}
        upload_parts(pair, "large", peft_config(), tensors)
        body["sets"] = [{"set": "large", "weight": 1e30}]
    before = snapshot(store)
    assert_problem(pair.post("/v1/combine", json=body), status, code)
    assert snapshot(store) == before
    assert pair.get("/v1/sets/new").status_code == 404


def test_a_set_that_was_created_meanwhile_is_kept(pair, store, monkeypatch):
    """The name is free when the combination is checked, and taken when it is stored."""
    report = Plan.report

    def create_first(plan, combined):
        other = BonsaiLoraSet.new(LoraConfig(), "", "new")
        with store.lock("new"):
            now = "2026-01-01T00:00:00Z"
            store.write(NextVersion(lora_set=other, origin="initialized", now=now, previous=None))
        return report(plan, combined)

    monkeypatch.setattr(Plan, "report", create_first)
    assert_problem(combine(pair, ("a", 1), ("b", 1)), 409, "set_exists")
    assert pair.get("/v1/sets/new").json()["origin"] == "initialized"


@pytest.mark.parametrize("kind", ["dora", "lora-bias", "modules-to-save"])
def test_what_has_no_sum_is_refused(client, store, kind, rng):
    prefix = f"base_model.model.{MODULE}"
    more, tensors = {}, peft_tensors(rng)
    if kind == "dora":
        more = {"use_dora": True}
        tensors[f"{prefix}.lora_magnitude_vector"] = np.ones(5, np.float32)
    elif kind == "lora-bias":
        more = {"lora_bias": True}
        tensors[f"{prefix}.lora_B.bias"] = np.ones(5, np.float32)
    else:
        more = {"modules_to_save": ["lm_head"]}
        tensors["base_model.model.lm_head.weight"] = np.ones((7, 6), np.float32)
    assert upload_parts(client, "a", peft_config(**more), tensors).status_code == 201
    before = snapshot(store)
    problem = assert_problem(combine(client, ("a", 1)), 422, "unsupported_adapter")
    assert problem["set"] == "a"
    assert snapshot(store) == before


def test_different_bases_are_a_warning(client, rng):
    for name in ("one", "two"):
        config = peft_config(base_model_name_or_path=name)
        upload_parts(client, name, config, peft_tensors(rng))
    made = combine(client, ("one", 1), ("two", 1), method="linear").json()
    assert made["base_model_name"] == "one"
    assert "different base models ('one', 'two')" in made["report"]["warnings"][0]
    assert "products of different sets" in made["report"]["warnings"][1]


def test_a_set_without_a_base_is_not_for_a_different_one(client, rng):
    for name, base in (("none", ""), ("one", "one")):
        config = peft_config(base_model_name_or_path=base)
        upload_parts(client, name, config, peft_tensors(rng))
    made = combine(client, ("none", 1), ("one", 1)).json()
    assert made["base_model_name"] == "one"
    assert made["report"]["warnings"] == []


def test_everything_is_counted_first(tmp_path, rng):
    settings = Settings(
        store=str(tmp_path / "store"), max_rank=6, memory_budget_bytes=1000, work_memory_bytes=1500
    )
    app = create_app(settings)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        upload_parts(client, "a", peft_config(), peft_tensors(rng, d_in=20, d_out=10))
        store = app.state.context.store
        before = snapshot(store._store)
        assert_problem(combine(client, ("a", 1), ("a", 1)), 422, "rank_too_large")
        assert_problem(
            combine(client, ("a", 1), method="svd", rank=6), 507, "memory_budget_exceeded"
        )
        refused = combine(client, ("a", 1), method="svd", rank=1)
        assert (
            "work_memory_bytes" in assert_problem(refused, 507, "memory_budget_exceeded")["detail"]
        )
        assert snapshot(store._store) == before
        assert app.state.context.memory.reserved_bytes == 0


def test_compare(pair, store):
    found = pair.get("/v1/compare?set=a&set=b&set=a").json()
    a, b = deltas(store, "a"), deltas(store, "b")
    flat = [
        np.concatenate([one.get(module, 0 * b[module]).ravel() for module in b])
        for one in (a, b, a)
    ]
    norms = [np.linalg.norm(one) for one in flat]
    assert found["sets"] == ["a", "b", "a"]
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-6)
    expected = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in flat] for x in flat]
    np.testing.assert_allclose(found["cosine"], expected, atol=1e-7)
    interference = 1 - np.linalg.norm(sum(flat)) ** 2 / sum(norms) ** 2
    assert found["interference"] == pytest.approx(interference)
    first, second = found["modules"]
    assert [first["name"], second["name"]] == [MODULE, OTHER]
    assert second["norms"][0] == second["norms"][2] == 0
    assert second["cosine"] == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert first["subspace_similarity"] is None


def test_subspace_similarity(pair, store):
    first, second = pair.get("/v1/compare?set=a&set=b").json()["modules"]
    bases = [
        np.linalg.svd(deltas(store, name)[MODULE])[2][:rank] for name, rank in (("a", 4), ("b", 3))
    ]
    expected = np.sum((bases[0] @ bases[1].T) ** 2) / 3
    assert first["subspace_similarity"] == pytest.approx(expected)
    assert second["subspace_similarity"] is None
    same = pair.get("/v1/compare?set=a&set=a").json()["modules"][0]
    assert same["subspace_similarity"] == pytest.approx(1)


def test_compare_refusals(pair, rng):
    upload_parts(pair, "wide", peft_config(), peft_tensors(rng, d_in=8))
    assert_problem(pair.get("/v1/compare"), 422, "invalid_request")
    assert_problem(pair.get("/v1/compare?set=a&set=absent"), 404, "set_not_found")
    problem = assert_problem(pair.get("/v1/compare?set=a&set=wide"), 422, "shape_mismatch")
    assert (problem["got"], problem["expected"]) == ("linear 8 -> 5", "linear 6 -> 5")
    assert_problem(pair.get("/v1/compare?" + "&".join(["set=a"] * 65)), 422, "invalid_request")
    assert pair.get("/v1/compare?" + "&".join(["set=a"] * 64)).is_success
    assert_problem(pair.get("/v1/compare?set=a&sets=b"), 422, "invalid_request")


def test_long_answers_are_refused(tmp_path, rng):
    app = create_app(Settings(store=str(tmp_path / "store"), max_answer_bytes=100))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        upload_parts(client, "a", peft_config(), peft_tensors(rng))
        assert client.get("/v1/compare?set=a&set=a").is_success
        assert_problem(client.get("/v1/compare?set=a&set=a&set=a"), 413, "answer_too_large")


@pytest.mark.parametrize(
    ("path", "rank", "too_few_bytes"),
    [
        ("/v1/compare?" + "&".join(["set=a", "set=b"] * 32), 1, 64 << 20),
        ("/v1/sets/a/spectrum", 40, 1 << 20),
    ],
    ids=["compare", "spectrum"],
)
def test_results_are_counted_until_they_are_sent(tmp_path, rng, path, rank, too_few_bytes):
    """They may be longer than the sets, and a client slow to read them."""
    sets = {}
    for name in ("a", "b"):
        for layer in range(400):
            module = f"model.layers.{layer}.self_attn.q_proj"
            sets.setdefault(name, {}).update(peft_tensors(rng, module, rank, 50, 50))
    for budget in (too_few_bytes, 1 << 30):
        app = create_app(Settings(store=str(tmp_path / str(budget)), threads=1))
        memory = app.state.context.memory
        with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
            for name, tensors in sets.items():
                upload_parts(client, name, peft_config(r=rank), tensors).raise_for_status()
            memory.total_bytes = budget
            if budget == too_few_bytes:
                assert_problem(client.get(path), 507, "memory_budget_exceeded")
                continue
            with client.stream("GET", path) as answer:
                length = int(answer.headers["content-length"])
                if length > 1 << 24:  # more than sockets keep
                    assert memory.reserved_bytes >= length
                assert len(answer.read()) == length
            deadline = time.monotonic() + 10
            while memory.reserved_bytes:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_spectrum(client):
    upload(client, "plain", TINY / "plain")
    found = client.get("/v1/sets/plain/spectrum").json()["modules"]
    tensors = read_tensors(TINY / "plain" / "adapter_model.safetensors")
    assert len(found) == 14
    for module in found:
        key = f"base_model.model.{module['name']}.lora_"
        delta = 2.0 * tensors[f"{key}B.weight"].astype(float) @ tensors[f"{key}A.weight"]
        values = np.linalg.svd(delta, compute_uv=False)[: module["rank"]]
        np.testing.assert_allclose(module["singular_values"], values, rtol=1e-5)
        assert module["frobenius_norm"] == pytest.approx(np.linalg.norm(delta))
        assert module["spectral_norm"] == pytest.approx(values[0])
        assert module["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2)
        shares = np.cumsum(values**2) / np.sum(values**2)
        assert module["energy_rank_90"] == np.argmax(shares >= 0.9) + 1
        assert module["energy_rank_99"] == np.argmax(shares >= 0.99) + 1
    one = client.get(f"/v1/sets/plain/spectrum?module={MODULE}").json()["modules"]
    assert [module["name"] for module in one] == [MODULE]
    refused = client.get("/v1/sets/plain/spectrum?module=lm_head")
    assert_problem(refused, 404, "module_not_found")


def test_the_spectrum_of_an_untrained_set_is_zero(client):
    client.post("/v1/sets", json={"name": "s", "config": {"rank": 2},
                                  "mlp": {"hidden_size": 8, "intermediate_size": 4}})  # fmt: skip
    module = client.get("/v1/sets/s/spectrum").json()["modules"][0]
    assert module["singular_values"] == [0, 0]
    assert module["stable_rank"] == module["effective_rank"] == module["energy_rank_90"] == 0
    assert client.get("/v1/compare?set=s").json()["cosine"] == [[0]]


def test_a_key_combines_what_it_may_read(tmp_path, rng):
    made = KeysFileMaker(tmp_path / "keys.json")
    root = made.add(["read", "write", "apply", "pull"], [""])
    tenant, writer = made.add(), made.add(["write"])
    app = create_app(Settings(store=str(tmp_path / "store"), keys_file=made.path))
    with serving(app) as url:
        with caller(url, root) as client:
            for name in ("acme.one", "umbra.one"):
                upload_parts(client, name, peft_config(), peft_tensors(rng))
        with caller(url, tenant) as client:
            body = {"name": "acme.new", "sets": [{"set": "acme.one"}]}
            foreign = body | {"sets": [{"set": "acme.one"}, {"set": "umbra.one"}]}
            assert_problem(client.post("/v1/combine", json=foreign), 404, "set_not_found")
            assert_problem(
                client.post("/v1/combine", json=body | {"name": "umbra.new"}), 403, "name_not_yours"
            )
            assert_problem(
                client.get("/v1/compare?set=acme.one&set=umbra.one"), 404, "set_not_found"
            )
            assert client.post("/v1/combine", json=body).status_code == 201
        with caller(url, writer) as client:
            named = body | {"name": "acme.other"}
            for refused in (
                client.post("/v1/combine", json=named),
                client.get("/v1/compare?set=acme.one"),
            ):
                assert assert_problem(refused, 403, "forbidden")["scope"] == "read"


def test_tensors_of_combined_sets_are_float32(pair, store):
    combine(pair, ("a", 1), ("b", 1))
    content = pair.get("/v1/sets/new/adapter_model.safetensors").content
    assert {one.dtype for one in safetensors.decode(content)[0].values()} == {np.dtype(np.float32)}
