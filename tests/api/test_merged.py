"""Merged checkpoints that exist only while they are read."""

import json
import shutil

import httpx
import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors.numpy
from conftest import TINY, assert_problem, peft_config, peft_tensors, serving, upload, upload_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors as ours

PATH = "/v1/bases/tiny-qwen3/merged"


def write_base(folder, tensors, **config):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(ours.encode(tensors, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))


def test_bases(based, tmp_path):
    info = based.get("/v1/bases").json()["bases"]
    assert [one["name"] for one in info] == ["tiny-qwen3"]
    assert info[0] == based.get("/v1/bases/tiny-qwen3").json()
    assert info[0]["parameter_count"] == 127_424
    assert info[0]["dtypes"] == {"BF16": 127_424}
    assert "config.json" in {one["name"] for one in info[0]["files"]}
    assert_problem(based.get("/v1/bases/nothing"), 404, "base_not_found")
    write_base(tmp_path / "bases" / "new", {"x": np.ones(3, np.float32)})
    assert len(based.get("/v1/bases").json()["bases"]) == 2


@pytest.mark.parametrize("adapter", ["plain", "attention-only", "rslora-patterns", "dora"])
def test_whole_files_equal_pefts_merge_rounded_once(based, adapter):
    upload(based, adapter, TINY / adapter)
    golden = safetensors.numpy.load_file(TINY / adapter / "merged_f32.safetensors")
    files = based.get(f"{PATH}/{adapter}").json()["files"]
    assert {one["name"] for one in files} == {path.name for path in (TINY / "base").iterdir()}
    seen = set()
    for one in files:
        answer = based.get(f"{PATH}/{adapter}/{one['name']}")
        original = (TINY / "base" / one["name"]).read_bytes()
        assert len(answer.content) == one["size_bytes"] == len(original)
        assert answer.headers["etag"] == one["etag"]
        assert answer.headers["content-length"] == str(len(original))
        kind = "json" if one["name"].endswith(".json") else "octet-stream"
        assert answer.headers["content-type"] == f"application/{kind}"
        if not one["name"].endswith(".safetensors"):
            assert answer.content == original
            continue
        start = ours.decode_header(original).data_start
        assert answer.content[:start] == original[:start]
        tensors, _ = ours.decode(answer.content)
        base, _ = ours.decode(original)
        for name, got in tensors.items():
            seen.add(name)
            if name.removesuffix(".weight") not in {
                m["name"] for m in based.get(f"/v1/sets/{adapter}").json()["modules"]
            }:
                assert got.tobytes() == base[name].tobytes(), name
                continue
            exact = golden[name]
            # Rounded once: equal to golden's rounding except for sums halfway between two values.
            same = got.view(np.uint16) == exact.astype(ml_dtypes.bfloat16).view(np.uint16)
            assert same.mean() > 0.995, name
            assert (np.abs(got.astype(np.float32) - exact) <= np.abs(exact) * 2.0**-8 + 1e-7).all()
    assert seen == set(golden)


def test_any_range_is_a_slice_of_the_whole_file(based):
    upload(based, "plain", TINY / "plain")
    path = f"{PATH}/plain/model-00002-of-00003.safetensors"
    whole = based.get(path).content

    @given(st.integers(0, len(whole) - 1), st.integers(1, 5000))
    @settings(max_examples=60)
    def check(start, length):
        part = based.get(path, headers={"Range": f"bytes={start}-{start + length - 1}"})
        assert part.status_code == 206
        assert part.content == whole[start : start + length]

    check()
    several = based.get(path, headers={"Range": "bytes=0-7,5001-5003,-2"})
    assert whole[5001:5004] in several.content
    etag = based.head(path).headers["etag"]
    assert based.get(path, headers={"If-None-Match": etag}).status_code == 304
    beyond = based.get(path, headers={"Range": f"bytes={len(whole)}-"})
    assert_problem(beyond, 416, "range_not_satisfiable")


@given(st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_layouts_agree_with_float64(tmp_path_factory, data):
    from bonsai_lora.checkpoints.bases import BaseFolder
    from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
    from bonsai_lora.checkpoints.merged_files import merged_files
    from bonsai_lora.core.adapter import LoraAdapter
    from bonsai_lora.core.config import LoraConfig
    from bonsai_lora.core.loraset import BonsaiLoraSet

    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
    tensors, registry = {}, BonsaiLoraSet.new(LoraConfig(rank=1), "b", "s").registry
    for index in range(data.draw(st.integers(1, 5))):
        dtype = data.draw(st.sampled_from(kinds))
        d_out, d_in = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
        if data.draw(st.booleans()):
            tensors[f"norm{index}"] = rng.standard_normal(d_in).astype(dtype)
        tensors[f"m{index}.weight"] = rng.standard_normal((d_out, d_in)).astype(dtype)
        if index == 0 or data.draw(st.booleans()):
            config = LoraConfig(rank=data.draw(st.integers(1, 4)), alpha=3.0)
            a_matrix = rng.standard_normal((config.rank, d_in)).astype(np.float32)
            b_matrix = rng.standard_normal((d_out, config.rank)).astype(np.float32)
            registry = registry.add(
                f"m{index}", LoraAdapter(config, a_matrix, b_matrix, config.scaling)
            )
    root = tmp_path_factory.mktemp("bases")
    write_base(root / "b", tensors, tie_word_embeddings=False)
    base = BaseFolder(root).get("b")
    model = MergedModel(base, [Ingredient(BonsaiLoraSet(registry, "b", "s"), '"e"')])
    file = merged_files(model)["model.safetensors"]
    whole = b"".join(bytes(piece()) for piece in file.pieces(0, file.size_bytes))
    assert len(whole) == file.size_bytes
    for _ in range(8):
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        assert b"".join(bytes(piece()) for piece in file.pieces(start, stop)) == whole[start:stop]
    merged, _ = ours.decode(whole)
    for name, original in tensors.items():
        adapter = registry.get(name.removesuffix(".weight"))
        if adapter is None:
            assert merged[name].tobytes() == original.tobytes()
            continue
        exact = reference.merge(original, adapter.a_matrix, adapter.b_matrix, adapter.scaling)
        eps = float(ml_dtypes.finfo(original.dtype).eps)
        slack = 1e-5 if original.dtype != np.float64 else 1e-12
        assert (np.abs(merged[name].astype(float) - exact) <= np.abs(exact) * eps / 2 + slack).all()


def test_bare_names_match_every_layer(based):
    body = {"name": "bare", "config": {"rank": 1, "alpha": 2.0}}
    based.post("/v1/sets", json=body)
    weights = {"lora_A": [[1.0] * 64], "lora_B": [[0.5]] * 128}
    based.put("/v1/sets/bare/adapters/q_proj", json=weights)
    changed = 0
    for one in based.get(f"{PATH}/bare").json()["files"]:
        if one["name"].endswith(".safetensors"):
            got, _ = ours.decode(based.get(f"{PATH}/bare/{one['name']}").content)
            base, _ = ours.decode((TINY / "base" / one["name"]).read_bytes())
            for name in got:
                if name.endswith("q_proj.weight"):
                    changed += 1
                    delta = got[name].astype(np.float32) - base[name].astype(np.float32)
                    assert np.abs(delta - 1).max() < 0.01
                else:
                    assert got[name].tobytes() == base[name].tobytes()
    assert changed == 2


def test_scale_and_several_sets(based):
    for name in ("plain", "attention-only"):
        upload(based, name, TINY / name)
    path = f"{PATH}/plain/model-00001-of-00003.safetensors"
    zero, _ = ours.decode(based.get(f"{path}?scale=0").content)
    base, _ = ours.decode((TINY / "base" / "model-00001-of-00003.safetensors").read_bytes())
    for name in base:
        assert np.array_equal(zero[name], base[name])
    one = based.get(path)
    half = based.get(f"{path}?scale=0.5")
    assert half.headers["etag"] != one.headers["etag"]
    both = f"{PATH}/plain/model-00002-of-00003.safetensors"
    got, _ = ours.decode(based.get(f"{both}?scale=0.5&set=attention-only&weight=0.25").content)
    base, _ = ours.decode((TINY / "base" / "model-00002-of-00003.safetensors").read_bytes())
    name = "model.layers.1.self_attn.q_proj"
    exact = base[f"{name}.weight"].astype(float)
    for set_name, weight in (("plain", 0.5), ("attention-only", 0.25)):
        tensors = safetensors.numpy.load_file(TINY / set_name / "adapter_model.safetensors")
        halves = [tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB"]
        scaling = 16 / len(halves[0])
        exact += weight * reference.delta_weight(*halves, scaling)
    assert (
        np.abs(got[f"{name}.weight"].astype(float) - exact) <= np.abs(exact) * 2.0**-8 + 1e-6
    ).all()
    assert_problem(based.get(f"{path}?weight=1"), 422, "invalid_request")
    assert_problem(based.get(f"{path}?set=plain"), 422, "invalid_request")
    for query in ("scale=nan", "scale=1e9", "set=attention-only&weight=-1e7"):
        assert_problem(based.get(f"{path}?{query}"), 422, "invalid_request")
        assert_problem(based.get(f"{PATH}/plain?{query}"), 422, "invalid_request")


def test_refusals(based, rng, tmp_path):
    upload_parts(
        based, "strange", peft_config(target_modules=["other"]), peft_tensors(rng, "other")
    )
    body = assert_problem(based.get(f"{PATH}/strange"), 422, "invalid_request")
    assert body["modules"] == ["other"]
    upload_parts(based, "shape", peft_config(), peft_tensors(rng))
    assert_problem(based.get(f"{PATH}/shape/config.json"), 422, "shape_mismatch")
    assert_problem(based.get(f"{PATH}/nothing"), 404, "set_not_found")
    upload(based, "plain", TINY / "plain")
    assert_problem(based.get(f"{PATH}/plain/nothing.json"), 404, "file_not_found")
    assert_problem(based.get(f"{PATH}/plain/..%2fconfig.json"), 404, "file_not_found")
    tensors = {"model.embed_tokens.weight": np.ones((10, 6), np.float32)}
    write_base(tmp_path / "bases" / "tied", tensors, tie_word_embeddings=True)
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 10), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((6, 4), np.float32),
    }
    upload_parts(based, "e", peft_config(target_modules=["embed_tokens"]), embedding)
    assert_problem(based.get("/v1/bases/tied/merged/e"), 422, "unsupported_adapter")
    based.post("/v1/sets", json={"name": "empty"})
    assert_problem(based.get(f"{PATH}/empty"), 422, "invalid_request")
    write_base(tmp_path / "bases" / "integers", {"x": np.ones(3, np.float32)})
    (tmp_path / "bases" / "integers" / "model.safetensors").write_bytes(b"cut off")
    assert_problem(based.get("/v1/bases/integers"), 422, "invalid_base")
    (tmp_path / "bases" / "folder" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "bases" / "tied" / "x\udcff.txt").write_text("not UTF-8")
    (tmp_path / "bases" / "tied" / "config.json").write_text("[1]")
    listed = based.get("/v1/bases").json()
    assert set(listed["bad"]) == {"integers"}
    assert [one["name"] for one in listed["bases"]] == ["tied", "tiny-qwen3"]
    assert_problem(based.get("/v1/bases/tied/merged/e"), 422, "unsupported_adapter")


def test_dora_of_a_replaced_tensor_is_refused(based, tmp_path, rng):
    base = {"m.weight": rng.standard_normal((5, 6)).astype(np.float32)}
    write_base(tmp_path / "bases" / "b", base)
    dora = peft_tensors(rng, "m") | {
        "base_model.model.m.lora_magnitude_vector": np.ones(5, np.float32)
    }
    upload_parts(based, "d", peft_config(target_modules=["m"], use_dora=True), dora)
    saved = peft_tensors(rng, "n") | {"base_model.model.m.weight": np.ones((5, 6), np.float32)}
    config = peft_config(target_modules=["n"], modules_to_save=["m"])
    upload_parts(based, "r", config, saved)
    base["n.weight"] = base["m.weight"]
    shutil.rmtree(tmp_path / "bases" / "b")
    write_base(tmp_path / "bases" / "b", base)
    assert based.get("/v1/bases/b/merged/d").status_code == 200
    assert based.get("/v1/bases/b/merged/r").status_code == 200
    assert_problem(based.get("/v1/bases/b/merged/d?set=r"), 422, "unsupported_adapter")
    one = based.get("/v1/bases/b/merged/r/model.safetensors").content
    assert (ours.decode(one)[0]["m.weight"] == 1).all()


def test_replaced_and_embedded_tensors(based, tmp_path, rng):
    base = {
        "model.embed_tokens.weight": rng.standard_normal((10, 6)).astype(np.float16),
        "lm_head.weight": rng.standard_normal((10, 6)).astype(np.float16),
        "m.weight": rng.standard_normal((5, 6)).astype(np.float16),
        "m.bias": rng.standard_normal(5).astype(np.float16),
    }
    write_base(tmp_path / "bases" / "b", base)
    a_matrix, b_matrix = rng.standard_normal((4, 10)), rng.standard_normal((6, 4))
    bias = rng.standard_normal(5).astype(np.float32)
    head = rng.standard_normal((10, 6)).astype(np.float32)
    tensors = peft_tensors(rng, "m") | {
        "base_model.model.model.embed_tokens.lora_embedding_A": a_matrix.astype(np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": b_matrix.astype(np.float32),
        "base_model.model.lm_head.weight": head,
        "base_model.model.m.bias": bias,
    }
    config = peft_config(
        target_modules=["m", "embed_tokens"], modules_to_save=["lm_head"], bias="all"
    )
    assert upload_parts(based, "s", config, tensors).status_code == 201
    got, _ = ours.decode(based.get("/v1/bases/b/merged/s/model.safetensors").content)
    assert np.array_equal(got["lm_head.weight"], head.astype(np.float16))
    assert np.array_equal(got["m.bias"], bias.astype(np.float16))
    exact = base["model.embed_tokens.weight"] + reference.delta_weight(a_matrix, b_matrix, 2.0).T
    assert np.abs(got["model.embed_tokens.weight"] - exact).max() < 0.02


def test_a_changed_set_has_a_new_etag_but_downloads_in_flight_continue(based):
    upload(based, "plain", TINY / "plain")
    path = f"{PATH}/plain/model-00001-of-00003.safetensors"
    before = based.get(path)
    with based.stream("GET", path) as running:
        based.delete("/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj")
        assert running.read() == before.content
    after = based.get(path)
    assert after.headers["etag"] != before.headers["etag"]
    assert after.content != before.content
    stale = based.get(path, headers={"Range": "bytes=0-9", "If-Range": before.headers["etag"]})
    assert stale.status_code == 200


def test_an_overwritten_base_aborts_a_download(tmp_path):
    from bonsai_lora.checkpoints.bases import BaseFolder
    from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
    from bonsai_lora.checkpoints.merged_files import merged_files
    from bonsai_lora.core.config import LoraConfig
    from bonsai_lora.core.loraset import BonsaiLoraSet
    from bonsai_lora.errors import BaseChangedError

    write_base(tmp_path / "b", {"q_proj.weight": np.ones((2000, 1000), np.float32)})
    path = tmp_path / "b" / "model.safetensors"
    folder = BaseFolder(tmp_path)
    made = BonsaiLoraSet.new(LoraConfig(rank=1), "b", "s").add_adapters({"q_proj": (1000, 2000)})
    before = MergedModel(folder.get("b"), [Ingredient(made, '"e"')])
    file = merged_files(before)["model.safetensors"]
    pieces = file.pieces(0, file.size_bytes)
    next(pieces)()
    content = path.read_bytes()
    replaced = path.with_suffix(".new")
    replaced.write_bytes(content[:-4] + b"\0\0\0\0")
    replaced.rename(path)  # a new inode: downloads in flight keep the old file
    assert b"".join(bytes(piece()) for piece in file.pieces(0, file.size_bytes)) == content
    after = MergedModel(folder.get("b"), [Ingredient(made, '"e"')])
    assert after.digest != before.digest
    file = merged_files(after)["model.safetensors"]
    pieces = file.pieces(0, file.size_bytes)
    next(pieces)()
    with path.open("r+b") as same:
        same.write(content[:100])
        same.flush()
        import os

        os.utime(same.fileno(), ns=(1, 1))
    with pytest.raises(BaseChangedError):
        next(pieces)()


def test_downloads_beyond_the_limit_get_503(settings, tmp_path):
    tensors = {"q_proj.weight": np.ones((4000, 2000), np.float32)}
    write_base(tmp_path / "bases" / "b", tensors)
    known = settings.model_copy(update={"bases": str(tmp_path / "bases"), "max_concurrency": 1})
    with serving(create_app(known)) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
        client.put("/v1/sets/s/adapters/q_proj", json={"d_in": 2000, "d_out": 4000})
        path = "/v1/bases/b/merged/s/model.safetensors"
        with client.stream("GET", path) as slow:
            assert slow.status_code == 200
            refused = httpx.get(url + path)
            assert_problem(refused, 503, "busy")
            assert httpx.head(url + path).status_code == 200
        for _ in range(100):
            if (again := client.get(path)).status_code == 200:
                break
        assert ours.decode(again.content)[0]["q_proj.weight"].shape == (4000, 2000)


def test_the_hub_protocol(based):
    upload(based, "plain", TINY / "plain")
    path = "/tiny-qwen3/plain/resolve/main/model-00001-of-00003.safetensors"
    head = based.head(path)
    commit = head.headers["x-repo-commit"]
    assert len(commit) == 40
    native = based.get(f"{PATH}/plain/model-00001-of-00003.safetensors")
    assert based.get(path).content == native.content
    assert head.headers["content-length"] == str(len(native.content))
    for revision in ("main", "1", commit):
        info = based.get(f"/api/models/tiny-qwen3/plain/revision/{revision}").json()
        assert info["sha"] == commit
        assert {"rfilename": "config.json"} in info["siblings"]
    files = based.get(
        f"/api/models/tiny-qwen3/plain/tree/{commit}?recursive=true&expand=false"
    ).json()
    assert {one["path"] for one in files} == {one["rfilename"] for one in info["siblings"]}
    missing = based.get("/tiny-qwen3/plain/resolve/main/adapter_config.json")
    assert missing.status_code == 404
    assert missing.headers["x-error-code"] == "EntryNotFound"
    for wrong in ("/tiny-qwen3/no/resolve/main/x", "/no/plain/resolve/main/x"):
        assert based.get(wrong).headers["x-error-code"] == "RepoNotFound"
    old = based.get("/tiny-qwen3/plain/resolve/7/config.json")
    assert old.headers["x-error-code"] == "RevisionNotFound"
    config = based.get("/adapters/plain/resolve/main/adapter_config.json")
    assert config.json() == json.loads((TINY / "plain" / "adapter_config.json").read_text())
    listed = based.get("/api/models", params={"author": "tiny-qwen3"}).json()
    assert [one["id"] for one in listed] == ["tiny-qwen3/plain"]
    assert based.get("/api/agent-harnesses").status_code == 404


def test_the_hub_shows_why_a_set_does_not_fit(based):
    based.post("/v1/sets", json={"name": "wide", "config": {"rank": 1}})
    module = "model.layers.0.self_attn.q_proj"
    based.put(f"/v1/sets/wide/adapters/{module}", json={"d_in": 5, "d_out": 7})
    reason = based.get(f"{PATH}/wide").json()
    assert reason["code"] == "shape_mismatch"
    path = "/tiny-qwen3/wide/resolve/main/config.json"
    answer = based.get(path)
    assert_problem(answer, 403, "unmergeable")
    assert "x-error-code" not in answer.headers
    shown = f"{reason['detail']} (request {answer.headers['x-request-id']})"
    assert answer.headers["x-error-message"] == shown
    info = based.get("/api/models/tiny-qwen3/wide").json()
    assert {"rfilename": "config.json"} in info["siblings"]
    head = based.head(path)  # huggingface_hub shows the reason of a refused GET only
    assert head.status_code == 200
    assert len(head.headers["etag"]) == 42
    assert head.headers["x-repo-commit"] == info["sha"]
    assert head.headers["content-length"] == str((TINY / "base" / "config.json").stat().st_size)
    missing = based.head("/tiny-qwen3/wide/resolve/main/adapter_config.json")
    assert missing.status_code == 404
    assert missing.headers["x-error-code"] == "EntryNotFound"
    assert based.get("/api/models", params={"author": "tiny-qwen3"}).json() == []


def test_the_hub_describes_a_repository(based):
    upload(based, "plain", TINY / "plain")
    repo = "/api/models/tiny-qwen3/plain"
    info = based.get(repo, params={"blobs": True}).json()
    name = "model-00001-of-00003.safetensors"
    head = based.head(f"/tiny-qwen3/plain/resolve/main/{name}").headers
    size, oid = int(head["content-length"]), head["etag"].strip('"')
    assert {"rfilename": name, "size": size, "blobId": oid} in info["siblings"]
    [branch] = based.get(f"{repo}/refs").json()["branches"]
    assert branch == {"name": "main", "ref": "refs/heads/main", "targetCommit": info["sha"]}
    [commit] = based.get(f"{repo}/commits/main").json()
    assert (commit["id"], commit["date"]) == (info["sha"], info["lastModified"])
    found = based.post(f"{repo}/paths-info/main", data={"paths": [name, "no.txt"]})
    assert found.json() == [{"type": "file", "oid": oid, "size": size, "path": name}]
    assert based.get(f"{repo}/auth-check").status_code == 200
    assert based.get("/api/whoami-v2").json()["orgs"] == []
    for path in ("refs", "commits/main", "auth-check"):
        missing = based.get(f"/api/models/tiny-qwen3/no/{path}")
        assert missing.headers["x-error-code"] == "RepoNotFound"
    old = based.post(f"{repo}/paths-info/7", data={"paths": name})
    assert old.headers["x-error-code"] == "RevisionNotFound"


@pytest.mark.parametrize("tower", ["", "text."])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_dora_norms_are_of_the_weight_as_its_base_stores_it(
    based, tmp_path, rng, is_transposed, tower
):
    """An oblong weight shows how the base stores a square one, (in, out) or (out, in)."""
    shapes = {"h.0.attn.c_proj": (6, 6), "h.0.mlp.c_fc": (6, 9)}
    weights = {module: rng.standard_normal((d_out, d_in)).astype(np.float32)
               for module, (d_in, d_out) in shapes.items()}  # fmt: skip
    stored = {
        f"{tower}{module}.weight": np.ascontiguousarray(weight.T if is_transposed else weight)
        for module, weight in weights.items()
    }
    others = {f"audio.{module}.weight": weight for module, weight in weights.items() if tower}
    write_base(tmp_path / "bases" / "b", stored | others)
    tensors, loras = {}, {}
    for module, (d_in, d_out) in shapes.items():
        tensors |= peft_tensors(rng, module, d_in=d_in, d_out=d_out)
        magnitude = rng.uniform(0.5, 2, d_out).astype(np.float32)
        loras[module] = reference.Lora(*[*tensors.values()][-2:], 2.0, magnitude=magnitude)
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude
    config = peft_config(
        target_modules=["c_proj", "c_fc"], use_dora=True, fan_in_fan_out=True,
        base_model_name_or_path="org/b",
    )  # fmt: skip
    upload_parts(based, "d", config, tensors)
    x = rng.standard_normal(6).astype(np.float32)
    for module, weight in weights.items():
        body = {"inputs": [x.tolist()], "base_outputs": [(weight @ x).tolist()]}
        path = f"/v1/sets/d/adapters/{module}/apply{'?match=text.' if tower else ''}"
        got = based.post(path, json=body).json()["outputs"]
        expected = reference.adds(loras[module], x, weights=weight)
        assert reference.relative_error(np.array(got[0]), expected) < 1e-6


def test_merge_and_apply_mean_the_same_tensor(based, tmp_path, rng):
    """DoRA's norms come from the tensor that a merge changes; `match` chooses it for both."""
    leaf = "layers.0.self_attn.q_proj"
    weights = {
        f"{prefix}.{leaf}.weight": rng.standard_normal((5, 6)).astype(np.float32)
        for prefix in ("model", "mtp", "model.language_model")
    }
    write_base(tmp_path / "bases" / "b", weights)
    magnitude = np.abs(rng.standard_normal(5)).astype(np.float32)
    tensors = peft_tensors(rng, leaf) | {
        f"base_model.model.{leaf}.lora_magnitude_vector": magnitude
    }
    config = peft_config(use_dora=True, base_model_name_or_path="org/b")
    upload_parts(based, "d", config, tensors)
    x = rng.standard_normal((2, 6)).astype(np.float32)
    path = f"/v1/sets/d/adapters/{leaf}/apply"
    for url, body in (
        ("/v1/bases/b/merged/d", None),
        (path, {"inputs": [[0.0] * 6], "base_outputs": [[0.0] * 5]}),
    ):
        refused = based.get(url) if body is None else based.post(url, json=body)
        problem = assert_problem(refused, 422, "invalid_request")
        assert set(problem["candidates"]) == {
            f"model.{leaf}.weight",
            f"model.language_model.{leaf}.weight",
        }
    for prefix in ("mtp", "model.language_model"):
        params = {"match": f"{prefix}."}
        content = based.get("/v1/bases/b/merged/d/model.safetensors", params=params).content
        merged = ours.decode(content)[0]
        changed = [name for name in weights if (merged[name] != weights[name]).any()]
        assert changed == [f"{prefix}.{leaf}.weight"]
        base_outputs = x @ weights[changed[0]].T
        body = {"inputs": x.tolist(), "base_outputs": base_outputs.tolist()}
        got = np.array(based.post(path, json=body, params=params).json()["outputs"])
        expected = x.astype(np.float64) @ merged[changed[0]].T.astype(np.float64)
        assert reference.relative_error(got + base_outputs, expected) < 1e-6
    nothing = {"match": "visual."}
    merge = assert_problem(
        based.get("/v1/bases/b/merged/d", params=nothing), 422, "invalid_request"
    )
    assert "match is 'visual.'" in merge["detail"]
    for url in (path, "/v1/sets/d/apply"):
        sent = {"inputs": {leaf: body["inputs"]}, "base_outputs": {leaf: body["base_outputs"]}}
        answer = based.post(url, json=body if url == path else sent, params=nothing)
        assert assert_problem(answer, 422, "invalid_request")["detail"] == merge["detail"]


def test_an_apply_that_does_not_need_the_base_ignores_match(based, rng):
    upload_parts(based, "s", peft_config(target_modules=["m"]), peft_tensors(rng, "m"))
    path, body = "/v1/sets/s/adapters/m/apply", {"inputs": [1.0] * 6}
    answers = [based.post(path, json=body, params=one) for one in ({}, {"match": "visual."})]
    assert answers[1].status_code == 200
    assert answers[1].content == answers[0].content


def test_files_in_subfolders_are_files_of_the_model(based, tmp_path, rng):
    write_base(tmp_path / "bases" / "b", {"m.weight": np.ones((5, 6), np.float32)})
    templates = tmp_path / "bases" / "b" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    (tmp_path / "bases" / "b" / "model.fp16.safetensors").write_bytes(b"stray")
    upload_parts(based, "s", peft_config(target_modules=["m"]), peft_tensors(rng, "m"))
    info = based.get("/v1/bases/b").json()
    assert info["ignored_files"] == ["model.fp16.safetensors"]
    names = [one["name"] for one in based.get("/v1/bases/b/merged/s").json()["files"]]
    assert names == ["additional_chat_templates/tools.jinja", "config.json", "model.safetensors"]
    for url in (f"/v1/bases/b/merged/s/{names[0]}", f"/b/s/resolve/main/{names[0]}"):
        assert based.get(url).text == "{{ tools }}"
    tree = "/api/models/b/s/tree/main"
    top = {one["path"]: one["type"] for one in based.get(tree).json()}
    assert top == {"additional_chat_templates": "directory", **dict.fromkeys(names[1:], "file")}
    inner = based.get(f"{tree}/additional_chat_templates").json()
    assert [(one["path"], one["size"]) for one in inner] == [(names[0], len("{{ tools }}"))]
    every = based.get(tree, params={"recursive": True}).json()
    assert [one["path"] for one in every] == ["additional_chat_templates", *names]
    for missing in ("additional", "config.json", "no/folder"):
        assert based.get(f"{tree}/{missing}").headers["x-error-code"] == "EntryNotFound"
    asked = {"paths": ["additional_chat_templates", names[0], "no"]}
    found = based.post("/api/models/b/s/paths-info/main", data=asked).json()
    assert [one["type"] for one in found] == ["directory", "file"]
