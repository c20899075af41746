"""Extraction against peft on torch: fine-tuned models come back when peft loads the set."""

import json
import shutil
import time

import httpx
import pytest
from conftest import TINY, serving

from bonsai_lora.api.app import create_app

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def change_matrices(model, tied):
    """What a fine-tuning could do: low-rank changes, norms, and rows of the embedding."""
    import torch

    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "down_proj.weight", "lm_head.weight")) and not (
                tied and "lm_head" in name
            ):
                rows, columns = parameter.shape
                parameter.add_(0.01 * torch.randn(rows, 4) @ torch.randn(4, columns))
            elif "norm" in name:
                parameter.mul_(1.1)
        model.get_input_embeddings().weight[5] += 1.0


@pytest.mark.parametrize("tied", [False, True])
def test_peft_makes_the_tuned_model_of_an_extracted_set(settings, tmp_path, tied):
    import torch
    from peft import PeftModel

    bases = tmp_path / "bases"
    shutil.copytree(TINY / "base", tmp_path / "untied")
    base = load(tmp_path / "untied")
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    base.save_pretrained(str(bases / "base"))
    tuned = load(bases / "base")
    change_matrices(tuned, tied)
    tuned.save_pretrained(str(bases / "tuned"))
    app = create_app(settings.model_copy(update={"bases": str(bases)}))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"name": "new", "base": "base", "tuned": "tuned", "rank": 4}
        started = client.post("/v1/extract", json=body)
        assert started.status_code == 202, started.text
        job = started.json()
        while job["state"] in ("queued", "running"):
            time.sleep(0.02)
            job = client.get(started.headers["location"]).json()
        assert job["state"] == "done", job
        kinds = {one["kind"] for one in job["result"]["report"]["modules"]}
        assert kinds == {"lora", "replaced", "token_rows"}
        folder = tmp_path / "loaded"
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes(client.get(f"/v1/sets/new/{file}").content)
    assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
    loaded = PeftModel.from_pretrained(load(bases / "base"), str(folder))
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected, got = tuned(tokens).logits, loaded(tokens).logits
        unchanged = load(bases / "base")(tokens).logits
    assert (expected - unchanged).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4)
