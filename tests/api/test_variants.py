"""DoRA, biases, embeddings and replaced modules over HTTP."""

import numpy as np
import pytest
import reference
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
from test_apply import decoded, post
from test_merge import BASE

MODULE = "model.layers.0.self_attn.q_proj"


def test_dora_agrees_with_torch_on_every_module(based):
    upload(based, "dora", TINY / "dora")
    golden = read_tensors(TINY / "dora" / "golden.safetensors")
    modules = [key.removesuffix(".y") for key in golden if key.endswith(".y")]
    assert len(modules) == 14
    everything = {}
    for module in modules:
        x, y = golden[f"{module}.x"], golden[f"{module}.y"].astype(np.float64)
        base_outputs = (x.astype(float) @ BASE[f"{module}.weight"].astype(float).T).astype(
            np.float32
        )
        path = f"/v1/sets/dora/adapters/{module}/apply"
        got = decoded(post(based, path, {"inputs": x, "base_outputs": base_outputs}))["outputs"]
        assert reference.relative_error(got + base_outputs, y) < 1e-6
        body = {"inputs": x.tolist(), "base_outputs": base_outputs.tolist()}
        as_json = based.post(path, json=body).json()["outputs"]
        assert np.array_equal(np.array(as_json, np.float32), got)
        everything |= {module: x, f"{module}.base_outputs": base_outputs}
    many = decoded(post(based, "/v1/sets/dora/apply", everything))
    assert many.keys() == set(modules)
    assert np.array_equal(many[modules[-1]], got)
    body = {
        "inputs": {modules[-1]: x.tolist()},
        "base_outputs": {modules[-1]: base_outputs.tolist()},
    }
    many = based.post("/v1/sets/dora/apply", json=body).json()["outputs"]
    assert np.array_equal(np.array(many[modules[-1]], np.float32), got)


def test_dora_merges_as_peft_does(based):
    upload(based, "dora", TINY / "dora")
    golden = read_tensors(TINY / "dora" / "merged_f32.safetensors")
    for module in based.get("/v1/sets/dora").json()["modules"]:
        weight = BASE[f"{module['name']}.weight"].astype(np.float32)
        answer = based.post(
            f"/v1/sets/dora/adapters/{module['name']}/merge?dtype=F32",
            content=weight.tobytes(),
            headers={"Content-Type": "application/octet-stream"},
        )
        got = np.frombuffer(answer.content, np.float32).reshape(weight.shape)
        expected = golden[f"{module['name']}.weight"]
        assert np.abs(got - expected).max() <= 8 * 2.0**-24 * np.abs(expected).max()
    refused = based.post(
        f"/v1/sets/dora/adapters/{MODULE}/merge?dtype=F32&unmerge=true",
        content=b"",
        headers={"Content-Type": "application/octet-stream"},
    )
    assert_problem(refused, 422, "unsupported_adapter")


def test_dora_without_base_or_base_outputs(client, based):
    x = [[0.5] * 64]
    path = f"/v1/sets/dora/adapters/{MODULE}/apply"
    upload(client, "dora", TINY / "dora")
    body = assert_problem(client.post(path, json={"inputs": x}), 422, "dora_needs_base")
    assert "base_outputs" in body["detail"]
    given = {"inputs": x, "base_outputs": [[0.0] * 128]}
    body = assert_problem(client.post(path, json=given), 422, "dora_needs_base")
    assert "tiny-qwen3" in body["detail"]
    upload(based, "dora", TINY / "dora")
    wrong = {"inputs": x, "base_outputs": [[0.0] * 127]}
    assert_problem(based.post(path, json=wrong), 422, "shape_mismatch")
    wrong = {"inputs": x, "base_outputs": [0.0] * 128}
    assert_problem(based.post(path, json=wrong), 422, "shape_mismatch")


def test_lora_bias(client, rng):
    tensors = peft_tensors(rng) | {
        f"base_model.model.{MODULE}.lora_B.bias": np.arange(5, dtype=np.float32)
    }
    upload_parts(client, "s", peft_config(lora_bias=True), tensors)
    a_matrix, b_matrix, bias = tensors.values()
    x = rng.standard_normal((3, 6)).astype(np.float32)
    got = decoded(post(client, f"/v1/sets/s/adapters/{MODULE}/apply", {"inputs": x}))["outputs"]
    expected = reference.apply(a_matrix, b_matrix, 2.0, x) + 2.0 * bias
    assert reference.relative_error(got, expected) < 1e-6
    merge = client.post(
        f"/v1/sets/s/adapters/{MODULE}/merge?dtype=F32",
        content=bytes(120),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert_problem(merge, 422, "unsupported_adapter")


def test_embeddings(client, rng):
    a_matrix = rng.standard_normal((4, 10)).astype(np.float32)
    b_matrix = rng.standard_normal((6, 4)).astype(np.float32)
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": a_matrix,
        "base_model.model.model.embed_tokens.lora_embedding_B": b_matrix,
    }
    upload_parts(client, "e", peft_config(target_modules=["embed_tokens"]), embedding)
    weight = rng.standard_normal((10, 6)).astype(np.float32)
    delta = reference.delta_weight(a_matrix, b_matrix, 2.0)
    tokens = np.eye(10, dtype=np.float32)[[3, 9]]
    path = "/v1/sets/e/adapters/model.embed_tokens"
    got = decoded(post(client, f"{path}/apply", {"inputs": tokens}))["outputs"]
    assert reference.relative_error(got, delta.T[[3, 9]]) < 1e-6
    merged = decoded(post(client, f"{path}/merge", {"weights": weight}))["weights"]
    assert reference.relative_error(merged, weight + delta.T) < 1e-6
    wrong = post(client, f"{path}/merge", {"weights": weight.T.copy()})
    assert_problem(wrong, 422, "shape_mismatch")


def test_fan_in_fan_out_is_false_for_linear_layers_as_peft_sets_it(client, rng):
    tensors = peft_tensors(rng, d_in=6, d_out=6)
    report = upload_parts(client, "t", peft_config(fan_in_fan_out=True), tensors)
    assert report.status_code == 201
    weight = rng.standard_normal((6, 6)).astype(np.float32)
    merged = decoded(post(client, f"/v1/sets/t/adapters/{MODULE}/merge", {"weights": weight}))
    delta = reference.delta_weight(*tensors.values(), 2.0)
    assert reference.relative_error(merged["weights"], weight + delta) < 1e-6


def test_conv1d_weights_are_merged_as_the_base_stores_them(client, rng):
    """(in, out), square or not, where the adapter says fan_in_fan_out and the name is Conv1D's."""
    for module, d_in, d_out in (("h.0.attn.c_proj", 6, 6), ("h.0.mlp.c_fc", 6, 9)):
        tensors = peft_tensors(rng, module, d_in=d_in, d_out=d_out)
        config = peft_config(fan_in_fan_out=True, target_modules=["c_proj", "c_fc"])
        upload_parts(client, "t", config, tensors)
        weight = rng.standard_normal((d_in, d_out)).astype(np.float32)
        merged = decoded(post(client, f"/v1/sets/t/adapters/{module}/merge", {"weights": weight}))
        delta = reference.delta_weight(*tensors.values(), 2.0)
        assert reference.relative_error(merged["weights"], weight + delta.T) < 1e-6


def test_replaced_parameters_are_kept_and_exported(client, rng, store):
    head = rng.standard_normal((7, 6)).astype(np.float16)
    bias = rng.standard_normal(5).astype(np.float32)
    tensors = peft_tensors(rng) | {
        "base_model.model.lm_head.weight": head,
        f"base_model.model.{MODULE}.bias": bias,
    }
    config = peft_config(modules_to_save=["lm_head"], bias="all")
    report = upload_parts(client, "s", config, tensors).json()
    assert report["total_trainable_params"] == 44 + 42 + 5
    content = client.get("/v1/sets/s/adapter_model.safetensors").content
    from bonsai_lora.formats import safetensors

    exported = safetensors.decode(content)[0]
    # Where peft finds the bias of a layer that it has wrapped.
    tensors[f"base_model.model.{MODULE}.base_layer.bias"] = tensors.pop(
        f"base_model.model.{MODULE}.bias"
    )
    assert exported.keys() == tensors.keys()
    for key, array in tensors.items():
        assert exported[key].dtype == array.dtype
        assert exported[key].tobytes() == array.tobytes()
    x = [[1.0] * 6]
    refused = client.post(f"/v1/sets/s/adapters/{MODULE}/apply", json={"inputs": x})
    assert_problem(refused, 422, "unsupported_adapter")
    before = snapshot(store)
    put = client.put("/v1/sets/s/adapters/other", json={"d_in": 1, "d_out": 1})
    assert_problem(put, 422, "unsupported_adapter")
    assert snapshot(store) == before


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_module_with_a_replaced_bias(client, rng, bias):
    other = "model.layers.1.self_attn.q_proj"
    tensors = peft_tensors(rng) | peft_tensors(rng, other)
    vectors = {f"base_model.model.{one}.bias": np.ones(5, np.float32) for one in (MODULE, other)}
    upload_parts(client, "s", peft_config(bias=bias), tensors | vectors)
    assert client.delete(f"/v1/sets/s/adapters/{MODULE}").status_code == 204
    files = {
        "adapter_config": client.get("/v1/sets/s/adapter_config.json").content,
        "adapter_model": client.get("/v1/sets/s/adapter_model.safetensors").content,
    }
    answer = client.put("/v1/sets/again", files=files)
    assert answer.status_code == 201, answer.text
    assert answer.json()["total_trainable_params"] == 44 + 5


def test_ignored_tensors_are_left_out(client, rng):
    original = "base_model.model.lm_head.original_module.weight"
    tensors = peft_tensors(rng) | {original: np.ones((9, 60), np.float32)}
    report = upload_parts(client, "s", peft_config(), tensors).json()
    assert report["ignored_keys"] == [original]
    stored = client.get("/v1/sets/s/adapter_model.safetensors").content
    assert len(stored) < 5000
    assert client.get("/v1/sets/s").json()["total_trainable_params"] == 44


def test_an_upload_is_written_once_and_its_header_fits(client, store, rng):
    """The data stays in its file; only the header before it is written."""
    many = {}
    for layer in range(300):
        many |= peft_tensors(rng, module=f"model.layers.{layer}.self_attn.q_proj")
    report = upload_parts(client, "s", peft_config(), many).json()
    assert report["adapter_count"] == 300
    path = store.root / "sets" / "s.safetensors"
    assert path.stat().st_size % 4096 == sum(one.nbytes for one in many.values()) % 4096
    exported = client.get("/v1/sets/s/adapter_model.safetensors").content
    from bonsai_lora.formats import safetensors

    assert safetensors.decode(exported)[0].keys() == many.keys()
    huge = peft_config(auto_mapping={"filler": "x" * 200_000})
    assert upload_parts(client, "s", huge, many).json()["version"] == 2
    assert client.get("/v1/sets/s/adapter_config.json").json() == huge
