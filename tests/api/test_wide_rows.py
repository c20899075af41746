"""Rows so wide that float32 sums would lose digits: DoRA's norms, by every route that needs them.

A row of n equal numbers v has the norm sqrt(n) |v|. Adding the constant v² to a growing float32
rounds the same way for a whole binade, so a float32 sum of a million terms is off by more than
1e-5, however many lanes share it. The right answer has the roundings of the norm, of m / norm and
of the product, each at most 2^-24.
"""

import json

import httpx
import numpy as np
import pytest
from conftest import peft_config, serving, upload_parts

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

WIDTH, VALUES = 1 << 20, (1.1, 0.3)
TOLERANCE = 4 * 2.0**-24
BINARY = {"Content-Type": "application/vnd.safetensors"}
MODULE = "c_attn"


@pytest.fixture(scope="module", params=["linear", "conv1d"])
def service(request, tmp_path_factory):
    """A client, W (2, 2^20) of two constant rows, and the exact m / norm.

    A base with Conv1D layers has the transposed W, whose columns are summed one row after the other.
    """
    root = tmp_path_factory.mktemp("wide")
    weights = np.repeat(np.array(VALUES, np.float32)[:, None], WIDTH, axis=1)
    (root / "bases" / "base").mkdir(parents=True)
    is_conv1d = request.param == "conv1d"
    stored = np.ascontiguousarray(weights.T) if is_conv1d else weights
    (root / "bases" / "base" / "config.json").write_text(
        json.dumps({"model_type": "gpt2" if is_conv1d else "llama"})
    )
    body = safetensors.encode({f"{MODULE}.weight": stored})
    (root / "bases" / "base" / "model.safetensors").write_bytes(body)
    magnitude = np.array([3.0, 700.0], np.float32)
    start = f"base_model.model.{MODULE}"
    tensors = {
        f"{start}.lora_A.weight": np.zeros((1, WIDTH), np.float32),
        f"{start}.lora_B.weight": np.zeros((2, 1), np.float32),
        f"{start}.lora_magnitude_vector": magnitude,
    }
    config = peft_config(r=1, target_modules=[MODULE], use_dora=True)
    config["base_model_name_or_path"] = "base"
    app = create_app(Settings(store=str(root / "store"), bases=str(root / "bases")))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert upload_parts(client, "s", config, tensors).status_code == 201
        exact = magnitude / (np.sqrt(WIDTH) * np.float32(VALUES).astype(np.float64))
        yield client, weights, exact


def test_apply_to_wide_rows(service):
    client, _, ratio = service
    tensors = {"inputs": np.zeros(WIDTH, np.float32), "base_outputs": np.ones(2, np.float32)}
    path = f"/v1/sets/s/adapters/{MODULE}/apply"
    answer = client.post(path, content=safetensors.encode(tensors), headers=BINARY)
    added = safetensors.decode(answer.content)[0]["outputs"].astype(np.float64)
    # ratio - 1, so that the error of the ratio is one of the sum of both.
    assert (np.abs(added - (ratio - 1)) <= TOLERANCE * (ratio + 1)).all()


def test_a_merged_file_with_wide_rows(service):
    client, weights, ratio = service
    answer = client.get("/v1/bases/base/merged/s/model.safetensors")
    merged = safetensors.decode(answer.content)[0][f"{MODULE}.weight"].astype(np.float64)
    merged = merged if merged.shape == weights.shape else merged.T
    exact = ratio[:, None] * weights
    assert (np.abs(merged - exact) <= TOLERANCE * exact).all()


def test_merged_weights_with_wide_rows(service):
    client, weights, ratio = service
    body = safetensors.encode({"weights": weights})
    answer = client.post(f"/v1/sets/s/adapters/{MODULE}/merge", content=body, headers=BINARY)
    merged = safetensors.decode(answer.content)[0]["weights"].astype(np.float64)
    exact = ratio[:, None] * weights
    assert (np.abs(merged - exact) <= TOLERANCE * exact).all()
