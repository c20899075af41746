"""Fused experts of a class that stores (E, in, out), as Llama 4 does, saved by peft 0.19 or later.

peft takes such parameters for (E, out, in), and so exchanges A and B. The file of peft 0.18 for
(E, out, in) parameters is the same, with what is in and out exchanged.
"""

import json

import numpy as np
import pytest
import reference
from conftest import DATA, read_tensors, upload, upload_parts

from bonsai_lora.formats import safetensors

MOE = DATA / "moe"
EXPERTS = "model.layers.0.mlp.experts"
WRAPPERS = {f"{EXPERTS}.base_layer": "gate_up_proj", EXPERTS: "down_proj"}


def write_base(folder, tensors):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors.encode(tensors))


def adapter():
    config = json.loads((MOE / "peft-0.18" / "adapter_config.json").read_text())
    config["peft_version"] = "0.21.2"
    return config, read_tensors(MOE / "peft-0.18" / "adapter_model.safetensors")


def deltas():
    """The delta of each parameter as it is stored, (E, in, out), from A and B in float64."""
    config, tensors = adapter()
    found = {}
    for wrapper, leaf in WRAPPERS.items():
        factors = [tensors[f"base_model.model.{wrapper}.lora_{half}.weight"] for half in "AB"]
        a_matrix = factors[0].astype(np.float64).reshape(3, 2, -1)
        b_matrix = factors[1].astype(np.float64).reshape(-1, 2, 3)
        delta = np.einsum("ope,epi->eoi", b_matrix, a_matrix)
        found[leaf] = config["lora_alpha"] / config["r"] * delta
    return found


@pytest.fixture
def stacked(based, tmp_path, rng):
    """A client of a service with a base of stacked experts, and the base's tensors."""
    tensors = {
        f"{EXPERTS}.{leaf}": rng.standard_normal(one.shape).astype(np.float32)
        for leaf, one in deltas().items()
    }
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 8), np.float32)
    write_base(tmp_path / "bases" / "b", tensors)
    return based, tensors


def merged(client, name):
    content = client.get(f"/v1/bases/b/merged/{name}/model.safetensors").content
    return safetensors.decode(content)[0]


def test_merged_as_stored_and_exported_bit_for_bit(stacked):
    client, before = stacked
    config, tensors = adapter()
    report = upload_parts(client, "s", config, tensors)
    assert report.status_code == 201, report.text
    assert report.json()["warnings"] == []
    got = merged(client, "s")
    for leaf, delta in deltas().items():
        name = f"{EXPERTS}.{leaf}"
        assert reference.relative_error(got[name], before[name] + delta) < 1e-6
    assert client.get("/v1/sets/s/adapter_config.json").json() == config
    exported = safetensors.decode(client.get("/v1/sets/s/adapter_model.safetensors").content)[0]
    assert exported.keys() == tensors.keys()
    assert all(exported[key].tobytes() == one.tobytes() for key, one in tensors.items())


def test_applied_from_in_to_out(stacked, rng):
    client, _ = stacked
    shapes = {
        one["name"]: (one["d_in"], one["d_out"], one["rank"], one["experts"])
        for one in upload_parts(client, "s", *adapter()).json()["modules"]
    }
    for wrapper, leaf in WRAPPERS.items():
        delta = deltas()[leaf]
        _, d_in, d_out = delta.shape
        assert shapes[wrapper] == (d_in, d_out, 2, 3)
        x = rng.standard_normal((5, d_in)).astype(np.float32)
        numbers = [2, 0, 1, 1, 0]
        body = {"inputs": x.tolist(), "experts": numbers}
        got = client.post(f"/v1/sets/s/adapters/{wrapper}/apply", json=body).json()["outputs"]
        expected = np.einsum("nio,ni->no", delta[numbers], x.astype(np.float64))
        assert reference.relative_error(np.array(got), expected) < 2e-6


def test_measured_and_combined(stacked):
    client, before = stacked
    upload_parts(client, "s", *adapter())
    found = {one["name"]: one for one in client.get("/v1/sets/s/stats").json()["modules"]}
    for wrapper, leaf in WRAPPERS.items():
        norm = np.linalg.norm(deltas()[leaf])
        assert found[wrapper]["delta_norm"] == pytest.approx(norm, rel=1e-5)
    for method in ("exact", "svd", "linear"):
        body = {"name": f"c-{method}", "sets": [{"set": "s", "weight": 3.0}], "method": method}
        answer = client.post("/v1/combine", json=body)
        assert answer.status_code == 201, answer.text
        got = merged(client, f"c-{method}")
        for leaf, delta in deltas().items():
            name = f"{EXPERTS}.{leaf}"
            assert reference.relative_error(got[name], before[name] + 3 * delta) < 1e-5, method


def test_a_base_with_separate_experts(stacked, tmp_path):
    """Such a base stores linear layers, (out, in)."""
    client, _ = stacked
    upload_parts(client, "s", *adapter())
    gate_up, down = deltas()["gate_up_proj"], deltas()["down_proj"]
    half = gate_up.shape[2] // 2
    parts = {"gate_proj": gate_up[..., :half], "up_proj": gate_up[..., half:], "down_proj": down}
    tensors = {
        f"{EXPERTS}.{number}.{leaf}.weight": np.zeros(one.shape[:0:-1], np.float32)
        for leaf, one in parts.items()
        for number in range(3)
    }
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 8), np.float32)
    write_base(tmp_path / "bases" / "separate", tensors)
    content = client.get("/v1/bases/separate/merged/s/model.safetensors").content
    got = safetensors.decode(content)[0]
    for leaf, one in parts.items():
        for number in range(3):
            name = f"{EXPERTS}.{number}.{leaf}.weight"
            assert reference.relative_error(got[name], one[number].T) < 1e-6, name


def test_the_same_file_of_an_older_peft_is_for_out_in(stacked):
    client, _ = stacked
    report = upload(client, "s", MOE / "peft-0.18").json()
    assert "exchanged; they were converted" in report["warnings"][0]
    assert client.get("/v1/sets/s/adapter_config.json").json()["peft_version"] == "0.19.0"
