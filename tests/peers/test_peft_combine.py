"""PEFT's combination types: the same sets, combined by peft on torch and by the service."""

import httpx
import numpy as np
import pytest
from conftest import serving, upload
from reference import delta_weight, relative_error

from bonsai_lora.api.app import create_app

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

DETERMINISTIC = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.4},
    "magnitude_prune": {"density": 0.4},
    "ties_svd": {"density": 0.4},
    "magnitude_prune_svd": {"density": 0.4},
}
WEIGHTS = (0.7, -0.4)


def make_model():
    """A model of a square, a wide and a tall layer, and an embedding, with two adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(30, 24)
            self.q_proj = torch.nn.Linear(24, 24, bias=False)
            self.up_proj = torch.nn.Linear(24, 60, bias=False)
            self.down_proj = torch.nn.Linear(60, 24, bias=False)

        def prepare_inputs_for_generation(self):
            """peft asks causal language models for it."""

    torch.manual_seed(5)
    targets = ["q_proj", "up_proj", "down_proj", "embed"]
    model = get_peft_model(
        Model(), LoraConfig(r=4, lora_alpha=8, target_modules=targets), adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def peft_model():
    return make_model()


@pytest.fixture
def sets(client, peft_model, tmp_path):
    peft_model.save_pretrained(str(tmp_path), selected_adapters=["a", "b"])
    for name in ("a", "b"):
        assert upload(client, name, tmp_path / name).status_code == 201
    return client


@pytest.mark.parametrize(
    ("method", "sign"),
    [
        *((method, None) for method in DETERMINISTIC),
        ("ties", "frequency"),
        ("ties_svd", "frequency"),
    ],
)
def test_the_same_deltas(sets, store, peft_model, method, sign):
    options = DETERMINISTIC[method]
    peft_model.add_weighted_adapter(
        ["a", "b"],
        list(WEIGHTS),
        "combined",
        combination_type=method,
        majority_sign_method=sign or "total",
        **options,
    )
    try:
        expected = {
            name: module.get_delta_weight("combined").detach().numpy()
            for name, module in peft_model.base_model.model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    finally:
        peft_model.delete_adapter("combined")
    body = {
        "name": "new",
        "sets": [
            {"set": name, "weight": weight} for name, weight in zip("ab", WEIGHTS, strict=True)
        ],
        "method": method,
        **options,
        **({"sign": sign} if sign else {}),
    }
    made = sets.post("/v1/combine", json=body)
    assert made.status_code == 201, made.text
    adapters = store.read("new").lora_set.registry.adapters
    assert adapters.keys() == expected.keys()
    for name, one in adapters.items():
        got = delta_weight(one.a_matrix, one.b_matrix, one.scaling)
        got = got.T if one.layer == "embedding" else got
        assert relative_error(got, expected[name]) < 2e-5, name


@pytest.mark.parametrize("method", ["svd", "exact"])
def test_peft_loads_a_combined_set(settings, peft_model, tmp_path, method):
    from peft import PeftModel

    peft_model.save_pretrained(str(tmp_path / "saved"), selected_adapters=["a", "b"])
    app = create_app(settings)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        for name in ("a", "b"):
            upload(client, name, tmp_path / "saved" / name)
        body = {"name": "new", "sets": [{"set": "a"}, {"set": "b"}], "method": method}
        assert client.post("/v1/combine", json=body).status_code == 201
        folder = tmp_path / "loaded"
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes(client.get(f"/v1/sets/new/{file}").content)
    base = make_model().unload()
    loaded = PeftModel.from_pretrained(base, str(folder))
    adapters = app.state.context.store.read("new").lora_set.registry.adapters
    for name, module in loaded.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            one = adapters[name]
            delta = delta_weight(one.a_matrix, one.b_matrix, one.scaling)
            expected = delta.T if one.layer == "embedding" else delta
            got = module.get_delta_weight("default").detach().numpy()
            assert relative_error(got, expected) < 1e-5
            assert np.abs(expected).max() > 0
