"""A grid over peft's options: made by peft on torch, uploaded, applied, merged, exported, loaded."""

import json
import shutil

import httpx
import numpy as np
import pytest
import reference
from conftest import TINY, serving, upload
from test_peft_model import load_base, logits

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.peft_fields import FIELDS

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "plain": {},
    "list": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "expression": {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "layers": {"layers_to_transform": [1]},
    "layers-pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.up_proj": 7, "layers.0.mlp.down_proj": 9},
        "alpha_pattern": {"^model.layers.0.*v_proj": 3.5, "o_proj": 40},
    },
    "rslora-patterns": {
        "use_rslora": True,
        "rank_pattern": {"proj": 2, "q_proj": 6},
        "lora_alpha": 7,
    },
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "lora-bias": {"lora_bias": True},
    "bias-all": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "head-adapted": {"target_modules": [*ALL, "lm_head"]},
    "embedding": {"target_modules": [*ALL, "embed_tokens"]},
    "fan-in-fan-out": {"fan_in_fan_out": True},
}


def make_adapter(folder, dtype, options):
    """Save an adapter with random weights on the tiny base; return the peft model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        **{"r": 5, "lora_alpha": 10, "target_modules": ALL, "task_type": "CAUSAL_LM"} | options
    )
    model = get_peft_model(load_base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = parameter.data.to(dtype).to(torch.float32)
    model.save_pretrained(folder)
    if dtype != torch.float32:
        path = folder / "adapter_model.safetensors"
        from safetensors.torch import load_file, save_file

        save_file(
            {key: value.to(dtype) for key, value in load_file(path).items()}, path, {"format": "pt"}
        )
    return model


@pytest.fixture
def service(settings, tmp_path):
    shutil.copytree(TINY / "base", tmp_path / "bases" / "base")
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    with serving(create_app(known)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", OPTIONS)
def test_option(service, tmp_path, case, dtype):
    import torch
    from peft import PeftModel

    if dtype != "float32" and case not in ("plain", "rslora-patterns", "head-saved", "embedding"):
        pytest.skip("16-bit files are tried with some options only")
    folder = tmp_path / "adapter"
    model = make_adapter(folder, getattr(torch, dtype), OPTIONS[case]).eval()
    report = upload(service, "s", folder)
    assert report.status_code == 201, report.text
    check_modules(service, model, report.json()["modules"])
    exported = tmp_path / "exported"
    exported.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (exported / name).write_bytes(service.get(f"/v1/sets/s/{name}").content)
    ours, _ = safetensors.decode((exported / "adapter_model.safetensors").read_bytes())
    theirs, _ = safetensors.decode((folder / "adapter_model.safetensors").read_bytes())
    ignored = report.json()["ignored_keys"]
    assert ours.keys() == theirs.keys() - set(ignored)
    for key, array in ours.items():
        assert array.dtype == theirs[key].dtype
        assert array.tobytes() == theirs[key].tobytes(), key
    again = PeftModel.from_pretrained(load_base(), exported).eval()
    assert reference.relative_error(logits(again), logits(model).astype(np.float64)) < 2e-6


def check_modules(service, model, modules):
    """What each adapted layer of torch adds is what the service adds."""
    import torch

    found = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if getattr(layer, "lora_A", None) or getattr(layer, "lora_embedding_A", None)
    }
    assert found.keys() == {one["name"] for one in modules}
    for one in modules:
        layer = found[one["name"]]
        is_embedding = isinstance(layer.base_layer, torch.nn.Embedding)
        x = np.random.default_rng(1).standard_normal((4, one["d_in"])).astype(np.float32)
        given = torch.from_numpy(x)
        if is_embedding:
            given = torch.tensor([1, 5, 17, 100])
            x = np.eye(one["d_in"], dtype=np.float32)[given.numpy()]
        with torch.no_grad():
            base = layer.base_layer(given)
            expected = (layer(given).double() - base.double()).numpy()
        body = {"inputs": x.tolist()}
        if getattr(layer, "use_dora", {}).get("default"):
            body["base_outputs"] = base.numpy().tolist()
        answer = service.post(f"/v1/sets/s/adapters/{one['name']}/apply", json=body)
        assert answer.status_code == 200, answer.text
        got = np.array(answer.json()["outputs"])
        scale = np.linalg.norm(base.double().numpy()) + np.linalg.norm(expected)
        assert np.linalg.norm(got - expected) < 2e-6 * scale, one["name"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_changed_the_base_are_refused(service, tmp_path, init):
    import torch

    make_adapter(tmp_path / "adapter", torch.float32, {"init_lora_weights": init})
    answer = upload(service, "s", tmp_path / "adapter")
    assert answer.status_code == 422
    assert answer.json()["code"] == "unsupported_adapter"


def test_a_converted_pissa_adapter_is_taken(service, tmp_path):
    """Saved with the initial weights, peft makes a plain adapter of twice the rank of it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(load_base(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    report = upload(service, "s", tmp_path / "adapter")
    assert report.status_code == 201, report.text
    assert {one["rank"] for one in report.json()["modules"]} == {8}


def test_the_table_of_fields_is_that_of_the_installed_peft():
    import dataclasses

    from peft import LoraConfig

    theirs = {field.name for field in dataclasses.fields(LoraConfig)}
    assert theirs == set(FIELDS), theirs ^ set(FIELDS)


def test_defaults_of_peft_are_taken(service, tmp_path, rng):
    """The shortest configuration that peft would read."""
    from conftest import peft_tensors

    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    files = {
        "adapter_config": json.dumps(config),
        "adapter_model": safetensors.encode(peft_tensors(rng, rank=8)),
    }
    report = service.put("/v1/sets/s", files=files).json()
    assert (report["config"]["rank"], report["config"]["alpha"]) == (8, 8.0)
