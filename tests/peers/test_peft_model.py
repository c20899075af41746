"""Against peft on torch: what it saves we apply; what we export it loads; both compute the same."""

import json

import httpx
import numpy as np
import pytest
import reference
from conftest import TINY, read_tensors, serving, upload

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

ADAPTERS = ["plain", "attention-only", "rslora-patterns"]


@pytest.fixture
def service(settings):
    with serving(create_app(settings)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def load_base():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)


def logits(model):
    import torch

    tokens = torch.from_numpy(np.load(TINY / "tokens.npy"))
    with torch.no_grad():
        return model(tokens).logits.numpy()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft_loads_our_export_and_computes_the_same(service, adapter, tmp_path):
    from peft import PeftModel

    upload(service, adapter, TINY / adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(service.get(f"/v1/sets/{adapter}/{name}").content)
    expected = read_tensors(TINY / adapter / "golden.safetensors")["logits"]
    got = logits(PeftModel.from_pretrained(load_base(), tmp_path))
    assert reference.relative_error(got, expected.astype(np.float64)) < 2e-6


@pytest.mark.parametrize("rank", [1, 8])
def test_peft_loads_a_set_made_here(service, rng, rank, tmp_path):
    """A set that never was in peft: initialized, one module's weights replaced."""
    import torch
    from peft import PeftModel

    body = {
        "name": "made",
        "config": {"rank": rank, "alpha": 3.0},
        "attention": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
        "num_layers": 2,
    }
    assert service.post("/v1/sets", json=body).status_code == 201
    module = "model.layers.1.self_attn.k_proj"
    tensors = {
        "lora_A": rng.standard_normal((5, 64)).astype(np.float32),
        "lora_B": rng.standard_normal((64, 5)).astype(np.float32),
    }
    service.put(
        f"/v1/sets/made/adapters/{module}?alpha=7",
        content=safetensors.encode(tensors),
        headers={"Content-Type": "application/vnd.safetensors"},
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(service.get(f"/v1/sets/made/{name}").content)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {module: 5}
    model = PeftModel.from_pretrained(load_base(), tmp_path)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for layer in range(2):
            path = f"model.layers.{layer}.self_attn.{name}"
            theirs = model.base_model.model.get_submodule(path)
            x = rng.standard_normal((3, theirs.in_features)).astype(np.float32)
            with torch.no_grad():
                inner = theirs.lora_B["default"](theirs.lora_A["default"](torch.from_numpy(x)))
                expected = (inner * theirs.scaling["default"]).numpy()
            answer = service.post(
                f"/v1/sets/made/adapters/{path}/apply", json={"inputs": x.tolist()}
            )
            got = np.array(answer.json()["outputs"])
            assert reference.relative_error(got, expected.astype(np.float64)) < 2e-6
