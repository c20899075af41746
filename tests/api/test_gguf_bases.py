"""GGUF bases over HTTP."""

import gguf_hostile
import gguf_models
import httpx
import numpy as np
import pytest
import reference
from conftest import assert_problem, peft_config, peft_tensors, serving, upload_parts

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import gguf, safetensors
from bonsai_lora.formats.hadamard import read_folding

MODULE = "model.layers.0.self_attn.q_proj"
PATH = "/v1/bases/bonsai/merged/s"


@pytest.fixture
def bases(tmp_path):
    folder = tmp_path / "bases"
    folder.mkdir()
    return folder


@pytest.fixture
def client(settings, bases):
    app = create_app(settings.model_copy(update={"bases": str(bases)}))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
def weights(bases, client, rng):
    """The weights of the base `bonsai`, in Q1_0, to which the set `s` is an adapter."""
    raw, weights = gguf_models.model("Q1_0", rng)
    (bases / "bonsai.gguf").write_bytes(raw)
    tensors = peft_tensors(rng, MODULE, d_in=256, d_out=256)
    assert upload_parts(client, "s", peft_config(), tensors).status_code == 201
    return weights


@pytest.mark.usefixtures("weights")
def test_a_gguf_base_is_listed(client):
    info = client.get("/v1/bases/bonsai").json()
    assert client.get("/v1/bases").json() == {"bases": [info], "bad": {}}
    assert (info["format"], info["architecture"]) == ("gguf", "qwen3")
    assert info["dtypes"] == {"Q1_0": 16, "F32": 9}
    assert [one["name"] for one in info["files"]] == ["bonsai.gguf"]


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("query", ["", "?dtype=BF16", "?dtype=Q8_0", "?dtype=F32&widen=all"])
def test_listed_files_can_be_read_whole_and_in_ranges(client, query):
    files = client.get(PATH + query).json()["files"]
    names = ["bonsai.gguf"] + ["config.json", "model.safetensors"] * ("Q8_0" not in query)
    assert [one["name"] for one in files] == names
    for one in files:
        path = f"{PATH}/{one['name']}{query}"
        head, whole = client.head(path), client.get(path)
        assert len(whole.content) == one["size_bytes"]
        assert head.headers["content-length"] == str(one["size_bytes"])
        assert head.headers["etag"] == whole.headers["etag"] == one["etag"]
        size = one["size_bytes"]
        part = client.get(path, headers={"Range": f"bytes=100-{size // 2}"})
        assert part.status_code == 206
        assert part.content == whole.content[100 : size // 2 + 1]
        several = client.get(path, headers={"Range": "bytes=0-9,-20"})
        assert whole.content[-20:] in several.content


def test_the_default_dtypes(client, weights):
    raw = client.get(f"{PATH}/bonsai.gguf").content
    header = gguf.read_header(gguf.reader_of(raw), len(raw))
    assert header.tensors["blk.0.attn_q.weight"].type.name == "F16"
    tensors = safetensors.decode(client.get(f"{PATH}/model.safetensors").content)[0]
    assert tensors.keys() == weights.keys()
    assert {one.dtype.name for one in tensors.values()} == {"bfloat16"}


@pytest.mark.usefixtures("weights")
def test_scale_changes_the_merge_of_a_gguf_base(client, weights):
    def merged(query):
        answer = client.get(f"{PATH}/model.safetensors?dtype=F32{query}")
        return safetensors.decode(answer.content)[0][f"{MODULE}.weight"].astype(np.float64)

    base = weights[f"{MODULE}.weight"].astype(np.float64)
    assert reference.relative_error(merged("&scale=-1") + merged(""), 2 * base) < 1e-5


@pytest.mark.parametrize("query", ["dtype=Q4_0", "dtype=f16", "widen=some", "widen="])
@pytest.mark.usefixtures("weights")
def test_unknown_types_are_refused(client, query):
    assert_problem(client.get(f"{PATH}/bonsai.gguf?{query}"), 422, "invalid_request")


@pytest.mark.usefixtures("weights")
def test_a_checkpoint_is_never_q8_0(client):
    path = f"{PATH}/model.safetensors?dtype=Q8_0"
    assert_problem(client.get(path), 404, "file_not_found")


@pytest.mark.parametrize("query", ["dtype=F16", "widen=all"])
def test_safetensors_bases_keep_their_dtypes(based, rng, query):
    tensors = peft_tensors(rng, MODULE, d_in=64, d_out=128)
    upload_parts(based, "s", peft_config(), tensors)
    refused = based.get(f"/v1/bases/tiny-qwen3/merged/s?{query}")
    assert "keep its dtypes" in assert_problem(refused, 422, "invalid_request")["detail"]


def test_hub_clients_find_the_base_and_the_merged_model(client, weights):
    for repo in ("bases/bonsai", "bonsai/s"):
        info = client.get(f"/api/models/{repo}").json()
        assert [one["rfilename"] for one in info["siblings"]] == [
            "config.json",
            "model.safetensors",
        ]
        got = client.get(f"/{repo}/resolve/main/model.safetensors")
        assert got.headers["x-repo-commit"] == info["sha"]
        tensors = safetensors.decode(got.content)[0]
        name = "model.layers.1.mlp.up_proj.weight"
        assert np.array_equal(tensors[name], weights[name].astype(tensors[name].dtype))
        is_merged = not np.array_equal(
            tensors[f"{MODULE}.weight"],
            weights[f"{MODULE}.weight"].astype(tensors[name].dtype),
        )
        assert is_merged == (repo == "bonsai/s")
    listed = {one["id"] for one in client.get("/api/models").json()}
    assert listed == {"adapters/s", "bases/bonsai", "bonsai/s"}
    missing = client.get("/api/models/bases/nothing")
    assert (missing.status_code, missing.headers["x-error-code"]) == (404, "RepoNotFound")


def test_hub_clients_learn_why_a_base_has_no_checkpoint(client, bases, weights, rng):
    """huggingface_hub shows the reason of a refused GET only, so the file is described."""
    assert weights
    keys = {"qwen3.rope.dimension_count": np.uint32(32)}
    (bases / "half.gguf").write_bytes(gguf_models.model("Q1_0", rng, **keys)[0])
    for repo in ("bases/half", "half/s"):
        listed = client.get(f"/api/models/{repo}").json()["siblings"]
        assert [one["rfilename"] for one in listed] == ["config.json"]
        path = f"/{repo}/resolve/main/config.json"
        assert client.head(path).status_code == 200
        detail = assert_problem(client.get(path), 403, "unmergeable")["detail"]
        assert "32 of the 64 values" in detail
        assert "put the model's config.json beside the file" in detail
    names = [one["name"] for one in client.get("/v1/bases/half/merged/s").json()["files"]]
    assert names == ["half.gguf", "model.safetensors"]
    assert "bases/half" not in {one["id"] for one in client.get("/api/models").json()}


def test_a_safetensors_base_is_a_repository_too(based):
    info = based.get("/api/models/bases/tiny-qwen3").json()
    name = "model.safetensors"
    got = based.get(f"/bases/tiny-qwen3/resolve/{info['sha']}/{name}")
    assert len(got.content) == int(got.headers["content-length"])


def test_dora_is_applied_with_norms_of_a_gguf_base(client, weights, rng):
    tensors = peft_tensors(rng, MODULE, d_in=256, d_out=256)
    prefix = f"base_model.model.{MODULE}"
    magnitude = rng.uniform(0.5, 2, 256).astype(np.float32)
    tensors[f"{prefix}.lora_magnitude_vector"] = magnitude
    config = peft_config(use_dora=True, base_model_name_or_path="acme/bonsai")
    assert upload_parts(client, "dora", config, tensors).status_code == 201
    x = rng.standard_normal((3, 256)).astype(np.float32)
    base = weights[f"{MODULE}.weight"].astype(np.float64)
    body = {"inputs": x.tolist(), "base_outputs": (x @ base.T).tolist()}
    answer = client.post(f"/v1/sets/dora/adapters/{MODULE}/apply", json=body)
    assert answer.status_code == 200, answer.text
    a, b = (tensors[f"{prefix}.lora_{one}.weight"].astype(np.float64) for one in "AB")
    total = base + 2 * b @ a
    want = x @ (total * (magnitude / np.linalg.norm(total, axis=1))[:, None] - base).T
    assert reference.relative_error(np.array(answer.json()["outputs"]), want) < 1e-4


def test_hostile_files_are_listed_as_bad(client, bases):
    names = {f"h{number}": case for number, case in enumerate(gguf_hostile.CASES.values())}
    for name, case in names.items():
        (bases / f"{name}.gguf").write_bytes(case[0])
    listed = client.get("/v1/bases").json()
    assert listed["bases"] == []
    assert listed["bad"].keys() == names.keys()
    for name in names:
        assert_problem(client.get(f"/v1/bases/{name}"), 422, "invalid_base")


@pytest.mark.parametrize("keys", [0, 3])
def test_heads_that_do_not_fit_are_refused_before_the_first_byte(client, bases, rng, keys):
    raw, _ = gguf_models.model(
        "Q1_0",
        rng,
        architecture="llama",
        **{"llama.attention.head_count_kv": np.uint32(keys)},
    )
    (bases / "bonsai.gguf").write_bytes(raw)
    module = "model.layers.0.self_attn.k_proj"
    tensors = peft_tensors(rng, module, d_in=256, d_out=128)
    config = peft_config(target_modules=["k_proj"])
    assert upload_parts(client, "s", config, tensors).status_code == 201
    for path in (PATH, f"{PATH}/bonsai.gguf", f"{PATH}/model.safetensors"):
        detail = assert_problem(client.get(path), 422, "unsupported_gguf")["detail"]
        assert f"128 values are not divided by {2 * keys} parts" in detail
    path = "/bases/bonsai/resolve/main/config.json"
    assert_problem(client.get(path), 403, "unmergeable")


def test_a_base_that_is_overwritten_is_read_again(client, bases, weights):
    path = f"{PATH}/model.safetensors?dtype=F32"
    before = client.get(path)
    raw, others = gguf_models.model("Q8_0", np.random.default_rng(8))
    (bases / "new").write_bytes(raw)
    (bases / "new").replace(bases / "bonsai.gguf")
    after = client.get(path)
    assert before.headers["etag"] != after.headers["etag"]
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = safetensors.decode(after.content)[0]
    assert np.array_equal(tensors[name], others[name])
    assert not np.array_equal(tensors[name], weights[name])


def test_the_base_decides_how_a_set_becomes_a_gguf_lora(client, weights, rng):
    assert weights
    config = peft_config(base_model_name_or_path="acme/bonsai")
    tensors = peft_tensors(rng, MODULE, d_in=256, d_out=256)
    upload_parts(client, "s", config, tensors)
    answer = client.get("/v1/sets/s/adapter.gguf")
    assert answer.status_code == 200, answer.text
    header = gguf.read_header(gguf.reader_of(answer.content), len(answer.content))
    assert header.architecture == "qwen3"
    assert header.tensors.keys() == {f"blk.0.attn_q.weight.lora_{half}" for half in "ab"}
    refused = client.get("/v1/sets/s/adapter.gguf?folded=true")
    assert_problem(refused, 422, "unsupported_adapter")


def test_a_gguf_lora_is_folded_for_a_folded_base(client, bases, rng):
    raw, _ = gguf_models.folded(rng)
    (bases / "bonsai.gguf").write_bytes(raw)
    module = "model.layers.0.mlp.up_proj"
    config = peft_config(base_model_name_or_path="bonsai", target_modules=["up_proj"])
    tensors = peft_tensors(rng, module, d_in=256, d_out=512)
    assert upload_parts(client, "s", config, tensors).status_code == 201

    def factor(query):
        answer = client.get(f"/v1/sets/s/adapter.gguf{query}")
        assert answer.status_code == 200, answer.text
        header = gguf.read_header(gguf.reader_of(answer.content), len(answer.content))
        info = header.tensors["blk.0.ffn_up.weight.lora_a"]
        values = np.frombuffer(answer.content[info.start : info.stop], np.float32)
        return values.reshape(info.shape), answer.headers["etag"]

    plain, tag = factor("")
    folded, other_tag = factor("?folded=true")
    assert tag != other_tag
    assert np.array_equal(plain, tensors[f"base_model.model.{module}.lora_A.weight"])
    read = gguf.reader_of(raw)
    folding = read_folding(gguf.read_header(read, len(raw)), read)
    assert np.allclose(folding.unfold(folded), plain, atol=1e-5)
    assert not np.allclose(folded, plain, atol=0.1)
