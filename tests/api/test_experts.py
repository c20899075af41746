"""Fused experts of MoE layers: uploaded, merged, exported as peft has them."""

import json
import shutil

import numpy as np
import pytest
import reference
import safetensors.numpy as theirs
from conftest import DATA, assert_problem, read_tensors, upload, upload_parts

from bonsai_lora.formats import safetensors

MOE = DATA / "moe"
EXPERTS = "model.layers.0.mlp.experts"
Q_PROJ = "model.layers.0.self_attn.q_proj"
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
    assert "exchanged; they were converted" in report["warnings"][0]
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


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ".*q_proj"},
        {"target_modules": ["q_proj"], "alpha_pattern": {".*down_proj": 8, "q_proj.gate_up": 1}},
    ],
)
@pytest.mark.parametrize(
    "targets", [["down_proj", "gate_up_proj"], ["down_proj", "experts.gate_up_proj"]]
)
def test_suffixes_without_a_module_mean_the_experts(moe, changes, targets):
    """As peft 0.21 writes them after it converted gate_proj, up_proj and down_proj."""
    config, tensors = uploaded("peft-0.21")
    report = upload_parts(moe, "s", {**config, **changes, "target_parameters": targets}, tensors)
    assert report.status_code == 201, report.text
    experts = {one["name"]: one["experts"] for one in report.json()["modules"]}
    assert experts == {f"{EXPERTS}.base_layer": 3, EXPERTS: 3, Q_PROJ: None}
    got, expected = merged(moe, "s"), read_tensors(MOE / "peft-0.21" / "merged.safetensors")
    for name, wanted in expected.items():
        assert reference.relative_error(got[name], wanted.astype(np.float64)) < 1e-6, name


def test_a_router_beside_such_suffixes(moe, rng):
    config, tensors = uploaded("peft-0.21")
    gate = "model.layers.0.mlp.gate"
    width = read_tensors(MOE / "base" / "model.safetensors")[f"{gate}.weight"].shape
    factors = {"A": rng.standard_normal((2, width[1])), "B": rng.standard_normal((width[0], 2))}
    for half, one in factors.items():
        tensors[f"base_model.model.{gate}.lora_{half}.weight"] = one.astype(np.float32)
    targets = ["down_proj", "gate.weight", "gate_up_proj"]
    report = upload_parts(moe, "s", {**config, "target_parameters": targets}, tensors)
    assert report.status_code == 201, report.text
    before = read_tensors(MOE / "base" / "model.safetensors")[f"{gate}.weight"]
    scaling = config["lora_alpha"] / 2
    wanted = before + scaling * factors["B"] @ factors["A"]
    assert reference.relative_error(merged(moe, "s")[f"{gate}.weight"], wanted) < 1e-6


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


def deltas(version):
    """What each expert's weights get, by wrapper: (E, d_out, d_in) as float64, from peft's merge."""
    before = read_tensors(MOE / "base" / "model.safetensors")
    after = read_tensors(MOE / version / "merged.safetensors")
    change = {name: after[name].astype(np.float64) - before[name] for name in before}

    def of(expert, part):
        return change[f"{EXPERTS}.{expert}.{part}_proj.weight"]

    gate_up = [np.concatenate([of(expert, "gate"), of(expert, "up")]) for expert in range(3)]
    return {
        f"{EXPERTS}.base_layer": np.stack(gate_up),
        EXPERTS: np.stack([of(e, "down") for e in range(3)]),
    }


def binary(client, path, tensors, **options):
    """POST safetensors, integers among them; the tensors of the answer."""
    answer = client.post(
        path,
        content=theirs.save(tensors, **options),
        headers={"Content-Type": "application/vnd.safetensors"},
    )
    assert answer.status_code == 200, answer.text
    return safetensors.decode(answer.content)[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_each_row_goes_through_its_expert(moe, rng, version):
    upload(moe, "s", MOE / version)
    experts = np.array([2, 0, 1, 1, 2, 0, 0])
    for module, delta in deltas(version).items():
        x = rng.standard_normal((7, delta.shape[2])).astype(np.float32)
        expected = np.einsum("noi,ni->no", delta[experts], x.astype(np.float64))
        path = f"/v1/sets/s/adapters/{module}/apply"
        body = {"inputs": x.tolist(), "experts": experts.tolist()}
        for _ in range(2):  # the second may come from what the first left behind
            got = np.array(moe.post(path, json=body).json()["outputs"])
            assert reference.relative_error(got, expected) < 2e-6
        for dtype in (np.int32, np.int64):
            sent = {"inputs": x, "experts": experts.astype(dtype)}
            assert reference.relative_error(binary(moe, path, sent)["outputs"], expected) < 2e-6
        one = moe.post(path, json={"inputs": x[3].tolist(), "experts": [1]}).json()["outputs"]
        assert reference.relative_error(np.array(one), expected[3]) < 2e-6


def test_many_modules_and_mixed_sets(moe, rng):
    upload(moe, "s", MOE / "peft-0.21")
    upload(moe, "t", MOE / "peft-0.18")
    new, old = deltas("peft-0.21"), deltas("peft-0.18")
    x = rng.standard_normal((4, 8)).astype(np.float32)
    q_proj, gate_up = "model.layers.0.self_attn.q_proj", f"{EXPERTS}.base_layer"
    experts = [1, 2, 0, 1]
    body = {"inputs": {gate_up: x.tolist(), q_proj: x.tolist()}, "experts": experts}
    answer = moe.post("/v1/sets/s/apply", json=body).json()["outputs"]
    expected = np.einsum("noi,ni->no", new[gate_up][experts], x.astype(np.float64))
    assert reference.relative_error(np.array(answer[gate_up]), expected) < 2e-6
    alone = moe.post(f"/v1/sets/s/adapters/{q_proj}/apply", json={"inputs": x.tolist()}).json()
    assert answer[q_proj] == alone["outputs"]
    sent = {gate_up: x, q_proj: x, "experts": np.array(experts)}
    got = binary(moe, "/v1/sets/s/apply", sent)
    assert reference.relative_error(got[gate_up], expected) < 2e-6
    mixed = {
        "module": gate_up,
        "sets": ["s", "t", None, [{"set": "s", "weight": 0.5}, {"set": "t", "weight": 2.0}]],
        "inputs": x.tolist(),
        "experts": experts,
    }
    rows = [
        new[gate_up][1] @ x[0],
        old[gate_up][2] @ x[1],
        np.zeros(12),
        (0.5 * new[gate_up][1] + 2.0 * old[gate_up][1]) @ x[3],
    ]
    got = np.array(moe.post("/v1/apply", json=mixed).json()["outputs"])
    assert reference.relative_error(got, np.stack(rows)) < 2e-6
    sent = {"inputs": x, "experts": np.array(experts, np.int32)}
    metadata = {"module": gate_up, "sets": json.dumps(mixed["sets"])}
    got = binary(moe, "/v1/apply", sent, metadata=metadata)["outputs"]
    assert reference.relative_error(got, np.stack(rows)) < 2e-6


@pytest.mark.parametrize(
    ("experts", "code"),
    [
        (None, "invalid_request"),
        ([0], "shape_mismatch"),
        ([0, 3], "invalid_request"),
        ([0, -1], "invalid_request"),
        ([0, 1.0], "invalid_request"),
        ([0, True], "invalid_request"),
        ([0, 2**70], "invalid_request"),
        ([[0], [1]], "invalid_request"),
        ("01", "invalid_request"),
    ],
)
def test_wrong_numbers_of_experts(moe, experts, code):
    upload(moe, "s", MOE / "peft-0.21")
    body = {"inputs": [[0.0] * 6] * 2, "experts": experts}
    answer = moe.post(f"/v1/sets/s/adapters/{EXPERTS}/apply", json=body)
    assert_problem(answer, 422, code)


def test_experts_of_modules_that_have_none(moe):
    upload(moe, "s", MOE / "peft-0.21")
    path = "/v1/sets/s/adapters/model.layers.0.self_attn.q_proj/apply"
    answer = moe.post(path, json={"inputs": [[0.0] * 8], "experts": [0]})
    assert "is not fused" in assert_problem(answer, 422, "invalid_request")["detail"]


def test_statistics_count_every_expert(moe):
    upload(moe, "s", MOE / "peft-0.21")
    norms = {module: np.linalg.norm(delta) for module, delta in deltas("peft-0.21").items()}
    stats = {one["name"]: one for one in moe.get("/v1/sets/s/stats").json()["modules"]}
    for module, norm in norms.items():
        assert stats[module]["delta_norm"] == pytest.approx(norm, rel=1e-5)
        assert stats[module]["rank"] == 2
        assert 1 < stats[module]["effective_rank"] <= 6
    assert stats[EXPERTS]["param_count"] == 3 * 2 * (6 + 8)


def test_a_base_of_more_or_fewer_experts_is_refused(moe, tmp_path):
    """None is left out in silence."""
    upload(moe, "s", MOE / "peft-0.21")
    tensors = read_tensors(MOE / "base" / "model.safetensors")
    fewer = {name: one for name, one in tensors.items() if ".experts.2." not in name}
    more = tensors | {
        name.replace(".experts.2.", ".experts.3."): one
        for name, one in tensors.items()
        if ".experts.2." in name
    }
    none = {name: one for name, one in tensors.items() if ".experts." not in name}
    for changed, code in (
        (fewer, "shape_mismatch"),
        (more, "shape_mismatch"),
        (none, "invalid_request"),
    ):
        file = tmp_path / "bases" / "moe" / "model.safetensors"
        file.unlink()
        file.write_bytes(safetensors.encode(changed))
        assert_problem(moe.get("/v1/bases/moe/merged/s"), 422, code)


def test_one_of_the_wrappers_can_be_deleted(moe):
    """The other keeps its meaning, as peft loads what is left."""
    upload(moe, "s", MOE / "peft-0.21")
    expected, base = (
        read_tensors(MOE / "peft-0.21" / "merged.safetensors"),
        read_tensors(MOE / "base" / "model.safetensors"),
    )
    assert moe.delete(f"/v1/sets/s/adapters/{EXPERTS}.base_layer").status_code == 204
    for name, one in merged(moe, "s").items():
        is_left = name.endswith(("down_proj.weight", "q_proj.weight"))
        wanted = (expected if is_left else base)[name]
        assert reference.relative_error(one, wanted.astype(np.float64)) < 1e-6, name
