"""Sets extracted from fine-tuned models: exact ranks, rounding, embeddings, norms, refusals."""

import json
import shutil
import time

import gguf_models
import httpx
import numpy as np
import pytest
from conftest import TINY, assert_problem, read_tensors, serving, snapshot
from ml_dtypes import bfloat16
from reference import delta_weight, relative_error

from bonsai_lora.api.app import create_app
from bonsai_lora.checkpoints import difference, extraction
from bonsai_lora.checkpoints.extraction import Size
from bonsai_lora.formats import safetensors
from bonsai_lora.service import jobs
from bonsai_lora.service.jobs import Progress

LAYER = "model.layers.0."
Q, DOWN, NORM = (
    f"{LAYER}{one}.weight" for one in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def bases(tmp_path):
    return tmp_path / "bases"


@pytest.fixture
def put(bases):
    """Write a checkpoint of one file."""

    def put(name, tensors, **config):
        folder = bases / name
        folder.mkdir(parents=True)
        settings = {"model_type": "qwen3", "tie_word_embeddings": False, **config}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "model.safetensors").write_bytes(safetensors.encode(tensors))

    return put


@pytest.fixture
def app(settings, bases):
    return create_app(settings.model_copy(update={"bases": str(bases)}))


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch):
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 0.05)


def extract(client, tuned="tuned", **changes):
    """The job of an extraction, when it has ended."""
    body = {"name": "new", "base": "base", "tuned": tuned, **changes}
    response = client.post("/v1/extract", json=body)
    assert response.status_code == 202, response.text
    for _ in range(2000):
        job = client.get(response.headers["location"]).json()
        if job["state"] not in ("queued", "running"):
            return job
        time.sleep(0.005)
    raise AssertionError(job)


def made_by(job):
    assert job["state"] == "done", job
    return job["result"]


def base_weights(rng, **more):
    shapes = {Q: (96, 80), DOWN: (80, 112), NORM: (80,), EMBEDDING: (400, 80), HEAD: (400, 80)}
    return {
        name: (rng.standard_normal(shape) * 0.03).astype(bfloat16)
        for name, shape in (shapes | more).items()
    }


def low_rank(rng, shape, rank, size):
    return (
        (rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1])))
        * size
        / rank**0.5
    )


def deltas(store, name="new"):
    """Deltas of a set by module, as the base stores them, float64."""
    found = {}
    for module, one in store.read(name).lora_set.registry.adapters.items():
        delta = delta_weight(one.a_matrix, one.b_matrix, one.scaling)
        found[module] = delta.T if one.layer == "embedding" else delta
    return found


@pytest.mark.parametrize("is_held", [True, False])
def test_a_known_delta_comes_back_with_the_error_of_rounding(
    client, store, put, rng, monkeypatch, is_held
):
    """Of the tuned weights only their rounding to bfloat16 is not of rank 16."""
    if not is_held:
        monkeypatch.setattr(difference, "HELD_VALUES", 0)
        monkeypatch.setattr(difference, "_BLOCK_VALUES", 1000)
    base = base_weights(rng)
    wanted = {name: low_rank(rng, base[name].shape, 16, 0.002) for name in (Q, DOWN)}
    tuned = base | {
        name: (base[name].astype(float) + delta).astype(bfloat16) for name, delta in wanted.items()
    }
    put("base", base)
    put("tuned", tuned)
    result = made_by(extract(client, rank=16))
    assert (result["origin"], result["base_model_name"]) == ("extracted", "base")
    assert result["config"]["target_modules"] == ["down_proj", "q_proj"]
    report = result["report"]
    assert (report["rank"], report["same"], report["warnings"]) == (16, 3, [])
    got = deltas(store)
    lost = total = 0.0
    for module in report["modules"]:
        name = module["name"]
        exact = tuned[name].astype(float) - base[name].astype(float)
        values = np.linalg.svd(exact, compute_uv=False)
        best = np.sum(values[16:] ** 2)
        assert module["kind"] == "lora"
        assert module["delta_norm"] == pytest.approx(np.linalg.norm(exact), rel=1e-6)
        assert module["relative_norm"] == pytest.approx(
            np.linalg.norm(exact) / np.linalg.norm(base[name].astype(float)), rel=1e-6
        )
        assert module["relative_error"] == pytest.approx(
            np.sqrt(best) / np.linalg.norm(exact), rel=1e-3
        )
        recovered = got[name.removesuffix(".weight")]
        assert relative_error(recovered, exact) == pytest.approx(module["relative_error"], rel=1e-4)
        # Against the delta itself: not more than all of the rounding.
        rounding = np.linalg.norm(exact - wanted[name]) / np.linalg.norm(wanted[name])
        assert 0.02 < rounding < 0.6
        assert relative_error(recovered, wanted[name]) < rounding
        lost, total = lost + best, total + np.sum(exact**2)
    assert report["relative_error"] == pytest.approx(np.sqrt(lost / total), rel=1e-3)
    assert report["energy_kept"] == pytest.approx(1 - lost / total, rel=1e-6)


def test_a_merge_by_peft_comes_back(client, store, bases):
    """merged_f32 was written by peft's merge_and_unload from float32 copies of the base."""
    shutil.copytree(TINY / "base", bases / "base")
    (bases / "tuned").mkdir()
    shutil.copy2(TINY / "base" / "config.json", bases / "tuned")
    shutil.copy2(TINY / "plain" / "merged_f32.safetensors", bases / "tuned" / "model.safetensors")
    result = made_by(extract(client, rank=8))
    assert result["adapter_count"] == 14
    assert result["report"]["relative_error"] < 1e-5
    tensors = read_tensors(TINY / "plain" / "adapter_model.safetensors")
    for module, got in deltas(store).items():
        key = f"base_model.model.{module}.lora_"
        a_matrix, b_matrix = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
        assert relative_error(got, delta_weight(a_matrix, b_matrix, 2)) < 2e-5


def test_energy_chooses_ranks(client, put, rng):
    base = base_weights(rng)
    tuned = dict(base)
    for name, rank in ((Q, 3), (DOWN, 24)):
        wide = base[name].astype(np.float32)
        tuned[name] = wide + low_rank(rng, wide.shape, rank, 0.01).astype(np.float32)
    put("base", base)
    put("tuned", tuned)
    modules = made_by(extract(client, energy=0.999))["report"]["modules"]
    ranks = {one["name"]: one["rank"] for one in modules}
    assert ranks[Q] == 3
    exact = np.linalg.svd(tuned[DOWN] - base[DOWN].astype(float), compute_uv=False) ** 2
    assert ranks[DOWN] == np.searchsorted(np.cumsum(exact), 0.999 * exact.sum()) + 1
    assert all(one["energy_kept"] >= 0.999 for one in modules)
    few = made_by(extract(client, name="few", energy=0.999, rank=2, modules=["q_proj"]))["report"]
    assert [(one["name"], one["rank"]) for one in few["modules"]] == [(Q, 2)]
    assert few["energy_kept"] < 0.999


def change_everything(rng, base):
    """Low-rank matrices, a norm, a bias, three rows of the embedding, the whole head."""
    tuned = dict(base)
    for name in (Q, DOWN, HEAD):
        wide = base[name].astype(float) + low_rank(rng, base[name].shape, 2, 0.01)
        tuned[name] = wide.astype(np.float32)
    for name in (NORM, f"{LAYER}self_attn.q_proj.bias"):
        tuned[name] = (base[name].astype(float) + 0.5).astype(bfloat16)
    rows = tuned[EMBEDDING] = base[EMBEDDING].copy()
    rows[[3, 7, 399]] *= 2
    return tuned


def test_every_form_survives_an_export_and_merges_to_the_tuned_model(client, store, put, rng):
    bias = f"{LAYER}self_attn.q_proj.bias"
    base = base_weights(rng, **{bias: (96,)})
    tuned = change_everything(rng, base)
    put("base", {name: one.astype(np.float32) for name, one in base.items()})
    put("tuned", tuned)
    result = made_by(extract(client, rank=4))
    kinds = {one["name"]: one["kind"] for one in result["report"]["modules"]}
    assert kinds == {
        Q: "lora",
        DOWN: "lora",
        HEAD: "lora",
        NORM: "replaced",
        bias: "replaced",
        EMBEDDING: "token_rows",
    }
    assert result["report"]["relative_error"] < 1e-4
    config = client.get("/v1/sets/new/adapter_config.json").json()
    assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 7, 399]}
    assert config["modules_to_save"] == ["model.layers.0.input_layernorm"]
    assert config["bias"] == "lora_only"
    assert config["target_modules"] == ["down_proj", "lm_head", "q_proj"]
    tensors = client.get("/v1/sets/new/adapter_model.safetensors").content
    files = {"adapter_config": json.dumps(config), "adapter_model": tensors}
    again = client.put("/v1/sets/again", files=files)
    assert again.status_code == 201, again.text
    assert again.json()["warnings"] == []
    for name in ("new", "again"):
        path = f"/v1/bases/base/merged/{name}/model.safetensors"
        merged, _ = safetensors.decode(client.get(path).content)
        for tensor, values in tuned.items():
            np.testing.assert_allclose(
                merged[tensor].astype(float), values.astype(float), rtol=1e-5, atol=1e-6
            )


def test_a_changed_embedding_is_of_low_rank_or_all_rows_if_the_head_shares_it(client, put, rng):
    base = base_weights(rng)
    tuned = dict(base)
    wide = base[EMBEDDING].astype(float) + low_rank(rng, base[EMBEDDING].shape, 2, 0.01)
    tuned[EMBEDDING] = wide.astype(np.float32)
    put("base", base)
    put("tuned", tuned)
    (module,) = made_by(extract(client, rank=2))["report"]["modules"]
    assert (module["kind"], module["rank"]) == ("lora", 2)
    tied = [{k: v for k, v in one.items() if k != HEAD} for one in (base, tuned)]
    put("tied", tied[0], tie_word_embeddings=True)
    put("tuned-tied", tied[1], tie_word_embeddings=True)
    body = {"name": "rows", "base": "tied", "rank": 2}
    (module,) = made_by(extract(client, "tuned-tied", **body))["report"]["modules"]
    assert (module["kind"], module["rows"], module["relative_error"]) == ("token_rows", 400, 0)
    exported = {
        part: client.get(f"/v1/sets/rows/{part}{ending}").content
        for part, ending in (("adapter_config", ".json"), ("adapter_model", ".safetensors"))
    }
    assert json.loads(exported["adapter_config"])["target_modules"] is None
    again = client.put("/v1/sets/again", files=exported)
    assert again.status_code == 201, again.text
    merged = client.get("/v1/bases/tied/merged/again/model.safetensors").content
    got = safetensors.decode(merged)[0][EMBEDDING]
    np.testing.assert_array_equal(got, tuned[EMBEDDING].astype(bfloat16))
    failed = extract(client, "tuned", **body | {"name": "untied"})
    assert failed["error"]["code"] == "unsupported_adapter"
    assert "ties its head" in failed["error"]["detail"]


def test_conv1d_weights_are_stored_the_other_way(client, put, store, rng):
    name = "transformer.h.0.attn.c_attn.weight"
    base = {name: rng.standard_normal((40, 120)).astype(np.float32)}
    delta = low_rank(rng, (40, 120), 2, 0.1).astype(np.float32)
    put("base", base, model_type="gpt2")
    put("tuned", {name: base[name] + delta}, model_type="gpt2")
    assert made_by(extract(client, rank=2))["modules"][0]["d_in"] == 40
    assert relative_error(next(iter(deltas(store).values())), delta.T) < 1e-5
    assert client.get("/v1/sets/new/adapter_config.json").json()["fan_in_fan_out"] is True
    merged = client.get("/v1/bases/base/merged/new/model.safetensors").content
    np.testing.assert_allclose(
        safetensors.decode(merged)[0][name], base[name] + delta, rtol=1e-4, atol=1e-5
    )


def test_only_adapted_weights_say_how_they_are_stored(client, put, rng):
    """A changed bias of a Conv1D layer has no orientation."""
    bias = "transformer.h.0.attn.c_attn.bias"
    base = {HEAD: rng.standard_normal((40, 120)).astype(np.float32), bias: np.ones(9, np.float32)}
    delta = low_rank(rng, (40, 120), 2, 0.1).astype(np.float32)
    put("base", base, model_type="gpt2")
    put("tuned", {HEAD: base[HEAD] + delta, bias: 2 * base[bias]}, model_type="gpt2")
    made_by(extract(client, rank=2))
    assert client.get("/v1/sets/new/adapter_config.json").json()["fan_in_fan_out"] is False


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_gguf_base(client, put, store, bases, rng, architecture):
    """Of llama the rows of q_proj are in a different order in the file."""
    raw, weights = gguf_models.model("Q1_0", rng, architecture=architecture)
    tuned = {name: one.astype(np.float32) for name, one in weights.items()}
    delta = low_rank(rng, weights[Q].shape, 2, 0.001)
    put("tuned", tuned | {Q: (weights[Q] + delta).astype(np.float32)}, model_type=architecture)
    (bases / "base.gguf").write_bytes(raw)
    report = made_by(extract(client, rank=2))["report"]
    assert [(one["name"], one["kind"]) for one in report["modules"]] == [(Q, "lora")]
    assert report["same"] == len(weights) - 1
    assert relative_error(deltas(store)[Q.removesuffix(".weight")], delta) < 1e-4


def test_stacked_experts_are_left_out_and_counted(client, put, rng):
    stack = f"{LAYER}mlp.experts.down_proj"
    base = base_weights(rng, **{stack: (4, 16, 8)})
    tuned = base | {
        Q: (base[Q].astype(float) + low_rank(rng, base[Q].shape, 2, 0.01)).astype(np.float32),
        stack: (base[stack].astype(float) + 0.01).astype(np.float32),
    }
    put("base", base)
    put("tuned", tuned)
    report = made_by(extract(client, rank=4))["report"]
    (lost,) = [one for one in report["modules"] if one["kind"] == "left_out"]
    assert (lost["name"], lost["relative_error"]) == (stack, 1.0)
    assert report["warnings"][0].startswith("1 of the changed tensors cannot be part")
    total = sum(one["delta_norm"] ** 2 for one in report["modules"])
    assert report["relative_error"] == pytest.approx(lost["delta_norm"] / np.sqrt(total), rel=1e-3)


def test_refusals_change_nothing(client, store, put, rng):
    base = base_weights(rng)
    put("base", base)
    put("same", base)
    put("fewer", {Q: base[Q]})
    put("wider", base | {Q: np.zeros((97, 80), np.float32)})
    put("norms", base | {NORM: base[NORM] * 2})
    put("nan", base | {Q: np.full((96, 80), np.nan, np.float32)})
    before = snapshot(store)

    def refuse(status, code, **changes):
        body = {"name": "new", "base": "base", "tuned": "same", "rank": 4, **changes}
        return assert_problem(client.post("/v1/extract", json=body), status, code)

    refuse(404, "base_not_found", tuned="absent")
    refuse(422, "invalid_request", rank=None)
    refuse(422, "invalid_request", modules=["absent"])
    refuse(422, "rank_too_large", rank=5000)
    refuse(422, "invalid_name", name="a/b")
    assert "4 tensors are in only one" in refuse(422, "invalid_request", tuned="fewer")["detail"]
    assert refuse(422, "shape_mismatch", tuned="wider")["got"] == [97, 80]
    client.post("/v1/sets", json={"name": "taken"})
    refuse(409, "set_exists", name="taken")
    client.delete("/v1/sets/taken")
    for tuned, code in (
        ("same", "invalid_request"),
        ("nan", "invalid_request"),
        ("norms", "unsupported_adapter"),
    ):
        job = extract(client, tuned, rank=4)
        assert (job["state"], job["error"]["code"]) == ("failed", code)
    assert snapshot(store) == before


def test_a_cancelled_extraction_stops_at_its_next_block(rng, put, app):
    put("base", base_weights(rng))
    put("tuned", base_weights(rng))
    found = app.state.context.bases
    progress = Progress()
    progress.is_cancelled = True
    pairs = extraction.pairs_of(found.get("base"), found.get("tuned"), [])
    difference_of = difference.Difference(pairs[0].base, pairs[0].tuned, progress.check)
    with pytest.raises(jobs.JobCancelledError):
        difference_of.survey()


def test_memory_of_results_is_reserved(rng, put, app):
    bias = f"{LAYER}self_attn.q_proj.bias"
    base = base_weights(rng, **{bias: (96,)})
    put("base", base)
    put("tuned", change_everything(rng, base))
    found = app.state.context.bases
    opened, tuned = found.get("base"), found.get("tuned")
    for pair in extraction.pairs_of(opened, tuned, []):
        reserved = []
        change = extraction.extract(opened, pair, Size(4), lambda: None, reserved.append)
        assert change.size_bytes <= sum(reserved) <= 2 * change.size_bytes > 0


def test_results_count_against_the_memory(settings, bases, put, rng):
    base = base_weights(rng)
    put("base", base)
    put("tuned", base_weights(rng))
    limited = settings.model_copy(
        update={"bases": str(bases), "memory_budget_bytes": 1000, "threads": 1}
    )
    with serving(create_app(limited)) as url, httpx.Client(base_url=url) as client:
        job = extract(client, rank=4)
        assert (job["state"], job["error"]["code"]) == ("failed", "memory_budget_exceeded")
