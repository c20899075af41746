"""The tiny model with a set that the service applies gives the numbers that peft gives."""

import runpy
import shutil
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import TINY, serving, upload

from bonsai_lora import Client, Layer
from bonsai_lora.api.app import create_app

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "qwen3_layers.py"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def load_base():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32).eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.load(TINY / "tokens.npy"))).logits


@pytest.mark.parametrize(
    ("adapter", "has_base"),
    [("plain", False), ("rslora-patterns", False), ("attention-only", False), ("dora", True)],
)
def test_a_model_with_a_set_is_that_of_peft(settings, tmp_path, adapter, has_base):
    from peft import PeftModel

    add_set = runpy.run_path(str(EXAMPLE))["add_set"]
    if has_base:
        shutil.copytree(TINY / "base", tmp_path / "bases" / "tiny-qwen3")
        settings = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    expected = logits(PeftModel.from_pretrained(load_base(), TINY / adapter).eval())
    model = load_base()
    before = logits(model)
    with serving(create_app(settings)) as url:
        with httpx.Client(base_url=url) as client:
            assert upload(client, adapter, TINY / adapter).status_code == 201
        with Client(url) as client:
            hooks = add_set(model, client, adapter)
            found = logits(model)
    assert float((found - expected).norm() / expected.norm()) < 2e-6
    assert float((before - expected).norm() / expected.norm()) > 1e-2
    for hook in hooks:
        hook.remove()
    assert bool((logits(model) == before).all())


def test_tensors_keep_their_dtype_and_gradients_are_refused(settings):
    import torch

    with serving(create_app(settings)) as url, Client(url) as client:
        client.upload_set("plain", TINY / "plain")
        layer = Layer(client, "plain", Q_PROJ)
        x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
        added = layer(x)
        assert (added.dtype, added.shape) == (torch.bfloat16, (2, 3, 128))
        expected = torch.from_numpy(layer(x.float().numpy())).to(torch.bfloat16)
        assert torch.equal(added, expected)
        with pytest.raises(ValueError, match=r"torch\.no_grad"):
            layer(x.requires_grad_())


def test_the_example_runs(settings, tmp_path, capsys, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(TINY / "base", folder)
    words = {word: number for number, word in enumerate(["?", "A", "bonsai", "is"])}
    words |= {f"w{number}": number for number in range(4, 128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    with serving(create_app(settings)) as url:
        with httpx.Client(base_url=url) as client:
            upload(client, "plain", TINY / "plain")
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(folder), "plain", url])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("without the set: A bonsai is")
    assert second.startswith("with plain: A bonsai is")
    assert first.split(": ")[1] != second.split(": ")[1]
