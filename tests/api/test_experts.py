"""Fused experts of MoE layers: uploaded, merged, exported as peft has them."""

import json
import shutil

import numpy as np
import pytest
import reference
from conftest import DATA, assert_problem, read_tensors, upload, upload_parts

from bonsai_lora.formats import safetensors

MOE = DATA / "moe"
EXPERTS = "model.layers.0.mlp.experts"
VERSIONS = ["peft-0.18", "peft-0.21"]


@pytest.fixture
def moe(based, tmp_path):
    """A client of a service that knows the base `moe`."""
    shutil.copytree(MOE / "base", tmp_path / "bases" / "moe")
    return based


def merged(client, name):
    content = client.get(f"/v1/bases/moe/merged/{name}/model.safetensors").content
    return safetensors.decode(content)[0]


def uploaded(version):
    config = json.loads((MOE / version / "adapter_config.json").read_text())
    return config, read_tensors(MOE / version / "adapter_model.safetensors")


@pytest.mark.parametrize("version", VERSIONS)
def test_merged_as_peft_merges(moe, version):
    report = upload(moe, "s", MOE / version).json()
    shapes = {
        one["name"]: (one["d_in"], one["d_out"], one["rank"], one["experts"])
        for one in report["modules"]
    }
    assert shapes == {
        f"{EXPERTS}.base_layer": (8, 12, 2, 3),
        EXPERTS: (6, 8, 2, 3),
        "model.layers.0.self_attn.q_proj": (8, 8, 2, None),
    }
    got, expected = merged(moe, "s"), read_tensors(MOE / version / "merged.safetensors")
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert reference.relative_error(got[name], wanted.astype(np.float64)) < 1e-6, name


def test_what_an_older_peft_wrote_is_turned_and_exported_so(moe):
    report = upload(moe, "s", MOE / "peft-0.18").json()
    assert "other way round" in report["warnings"][0]
    config = moe.get("/v1/sets/s/adapter_config.json").json()
    assert config["peft_version"] == "0.19.0"
    exported = safetensors.decode(moe.get("/v1/sets/s/adapter_model.safetensors").content)[0]
    assert exported[f"base_model.model.{EXPERTS}.base_layer.lora_A.weight"].shape == (6, 8)
    before = merged(moe, "s")
    again = upload_parts(moe, "s", config, exported).json()
    assert again["warnings"] == []
    after = merged(moe, "s")
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)


def test_what_a_new_peft_wrote_is_kept_bit_for_bit(moe):
    upload(moe, "s", MOE / "peft-0.21")
    exported = safetensors.decode(moe.get("/v1/sets/s/adapter_model.safetensors").content)[0]
    tensors = uploaded("peft-0.21")[1]
    assert exported.keys() == tensors.keys()
    assert all(exported[key].tobytes() == one.tobytes() for key, one in tensors.items())


@pytest.mark.parametrize("said_by", ["query", "configuration"])
def test_columns_that_lie_expert_by_expert(moe, said_by):
    """As unsloth laid them: the same adapter, another order of B's columns."""
    config, tensors = uploaded("peft-0.21")
    upload(moe, "s", MOE / "peft-0.21")
    expected = merged(moe, "s")
    grouped = {
        key: one.reshape(len(one), 2, 3).transpose(0, 2, 1).reshape(one.shape)
        if "experts" in key and "lora_B" in key
        else one
        for key, one in tensors.items()
    }
    if said_by == "query":
        report = upload_parts(
            moe, "s", config, grouped, params={"expert_b_layout": "grouped_by_expert"}
        )
    else:
        report = upload_parts(moe, "s", {**config, "lora_B_layout": "grouped_by_expert"}, grouped)
    assert report.status_code == 200, report.text
    got = merged(moe, "s")
    assert all(got[name].tobytes() == expected[name].tobytes() for name in expected)
    config = moe.get("/v1/sets/s/adapter_config.json").json()
    assert config.get("lora_B_layout") == "rank_major"
    asked = upload_parts(moe, "s", config, tensors, params={"expert_b_layout": "sideways"})
    assert asked.status_code == 422


def test_an_adapter_of_unsloth_that_says_nothing_is_a_warning(moe):
    config, tensors = uploaded("peft-0.21")
    report = upload_parts(moe, "s", {**config, "unsloth_fixed": True}, tensors).json()
    assert any("expert_b_layout" in one for one in report["warnings"])


def test_one_of_two_parameters(moe):
    config, tensors = uploaded("peft-0.21")
    for target, wrapper, weights in (
        ("mlp.experts.gate_up_proj", f"{EXPERTS}.base_layer", ("gate_proj", "up_proj")),
        ("experts.down_proj", EXPERTS, ("down_proj",)),
    ):
        alone = {
            key.replace(".experts.base_layer.", ".experts."): one
            for key, one in tensors.items()
            if key.startswith(f"base_model.model.{wrapper}.lora")
        }
        report = upload_parts(moe, "s", {**config, "target_parameters": [target]}, alone)
        assert report.status_code in (200, 201), report.text
        expected, got = read_tensors(MOE / "peft-0.21" / "merged.safetensors"), merged(moe, "s")
        base = read_tensors(MOE / "base" / "model.safetensors")
        for name, one in got.items():
            wanted = (
                expected[name]
                if name.endswith(tuple(f"{w}.weight" for w in weights))
                else base[name]
            )
            assert reference.relative_error(one, wanted.astype(np.float64)) < 1e-6, name


def test_a_base_that_stacks_its_experts(moe, tmp_path):
    """As the class has them, (E, out, in) or (E, in, out): the same sums."""
    upload(moe, "s", MOE / "peft-0.21")
    one_by_one = merged(moe, "s")
    before = read_tensors(MOE / "base" / "model.safetensors")

    def stacked(tensors, is_transposed):
        found = {name: one for name, one in tensors.items() if ".experts." not in name}
        parts = [
            [tensors[f"{EXPERTS}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")]
            for e in range(3)
        ]
        gate_up = np.stack([np.concatenate(one[:2]) for one in parts])
        down = np.stack([one[2] for one in parts])
        if is_transposed:
            gate_up, down = gate_up.transpose(0, 2, 1), down.transpose(0, 2, 1)
        return found | {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": down}

    for is_transposed in (False, True):
        file = tmp_path / "bases" / "moe" / "model.safetensors"
        file.unlink()
        file.write_bytes(safetensors.encode(stacked(before, is_transposed)))
        got = merged(moe, "s")
        expected = stacked(one_by_one, is_transposed)
        assert got.keys() == expected.keys()
        for name, wanted in expected.items():
            assert reference.relative_error(got[name], wanted.astype(np.float64)) < 1e-6, name


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"target_parameters": None}, "invalid_adapter"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "invalid_adapter"),
        ({"target_parameters": ["mlp.experts.w13", "mlp.experts.w2"]}, "unsupported_adapter"),
        ({"target_parameters": "mlp.experts.gate_up_proj"}, "invalid_adapter"),
        ({"r": 4}, "invalid_adapter"),
        ({"use_dora": True}, "unsupported_adapter"),
        ({"lora_B_layout": "sideways"}, "invalid_adapter"),
    ],
)
def test_refusals(moe, changes, code):
    config, tensors = uploaded("peft-0.21")
    answer = upload_parts(moe, "s", {**config, **changes}, tensors)
    assert_problem(answer, 422, code)


def test_one_module_cannot_be_merged_into_weights(moe):
    upload(moe, "s", MOE / "peft-0.21")
    answer = moe.post(f"/v1/sets/s/adapters/{EXPERTS}/merge", json={"weights": [[0.0] * 6] * 8})
    assert "3 fused experts" in assert_problem(answer, 422, "unsupported_adapter")["detail"]
