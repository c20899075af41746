"""Merged models of GGUF bases: llama.cpp on the GGUF file, transformers on the checkpoint."""

import json
import os
import subprocess
import sys

import gguf_files
import gguf_models
import httpx
import numpy as np
import pytest
from conftest import peft_config, serving, upload_parts

from bonsai_lora.api.app import create_app
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.gguf_lora import Model, encode_lora
from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
from bonsai_lora.checkpoints.merged_files import Rendering, hub_files, merged_files
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.formats import gguf_names
from bonsai_lora.formats.peft_options import PLAIN

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

TOKENS = np.array([1, 7, 95, 0, 33, 12, 12, 64, 50, 3])
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", *gguf_files.ENCODERS]
NATIVE = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"]
"""Types that llama.cpp itself computes with; PrismML's fork has the others."""
TOLERANCES = {"F32": 5e-6, "F16": 5e-4, "BF16": 1e-2, "Q8_0": 1e-2}
"""Largest difference, as a share of the logits' spread."""


@pytest.fixture(scope="module")
def llamacpp():
    pytest.importorskip("xllamacpp")
    import llamacpp

    return llamacpp


def merged(folder, raw, weights, modules):
    """The base with a set merged that changes all of `modules` in every layer."""
    (folder / "b.gguf").write_bytes(raw)
    return MergedModel(BaseFolder(folder).get("b"), ingredients(weights, modules))


def ingredients(weights, modules):
    rng = np.random.default_rng(4)
    config = LoraConfig(4, 8.0)
    made = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            d_out, d_in = weight.shape
            a = rng.standard_normal((4, d_in)).astype(np.float32)
            b = (0.01 * rng.standard_normal((d_out, 4))).astype(np.float32)
            made[module] = LoraAdapter(config, a, b, 2.0)
    one = BonsaiLoraSet(LoraRegistry(config, made), "", "s")
    return [Ingredient(one, '"s-1"')]


def written(file, path):
    path.write_bytes(b"".join(bytes(piece()) for piece in file.pieces(0, file.size_bytes)))
    return path


def gguf_logits(llamacpp, model, folder, dtype, **options):
    file = merged_files(model, Rendering(dtype, **options))["b.gguf"]
    return llamacpp.logits_of(written(file, folder / "merged.gguf"), TOKENS)


def checkpoint_logits(model, folder, dtype="F32"):
    """What transformers computes in float32 from the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    target = folder / "checkpoint"
    target.mkdir()
    for name, file in merged_files(model, Rendering(dtype)).items():
        if not name.endswith(".gguf"):
            written(file, target / name)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def difference(got, want):
    return np.abs(got - want).max() / np.ptp(want)


PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_programs_compute_the_same_from_every_type(llamacpp, tmp_path, rng, kind):
    raw, weights = gguf_models.model(kind, rng)
    model = merged(tmp_path, raw, weights, PROJECTIONS | {"lm_head"})
    want = checkpoint_logits(model, tmp_path)
    got = gguf_logits(llamacpp, model, tmp_path, "F32", is_widened=True)
    assert difference(got, want) < 5e-6


OTHERS = sorted(gguf_names.ARCHITECTURES - {"qwen3"})


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures(llamacpp, tmp_path, rng, architecture):
    """Sliding windows, capped scores, partial rotation and linear attention, as the keys say."""
    is_tied = architecture in ("gemma", "gemma2")
    raw, weights = gguf_models.model("Q1_0", rng, architecture=architecture, is_tied=is_tied)
    model = merged(tmp_path, raw, weights, PROJECTIONS)
    want = checkpoint_logits(model, tmp_path)
    got = gguf_logits(llamacpp, model, tmp_path, "F32", is_widened=True)
    # llama.cpp has GELU in a table of float16.
    assert difference(got, want) < (2e-5 if "gemma" in architecture else 5e-6)


@pytest.mark.parametrize("architecture", sorted(gguf_names.ARCHITECTURES))
def test_an_adapter_beside_the_base_is_what_is_merged(llamacpp, tmp_path, rng, architecture):
    """Rows ordered by head, columns, fused projections and experts, in a GGUF LoRA of our own."""
    is_tied = architecture in ("gemma", "gemma2")
    raw, weights = gguf_models.model("F32", rng, architecture=architecture, is_tied=is_tied)
    model = merged(tmp_path, raw, weights, PROJECTIONS)
    base = model.base
    known = Model(architecture, base.heads, base.is_tied, base.experts)
    lora = encode_lora(model._ingredients[0].lora_set, PLAIN, known, "F32", '"tag"')
    path = written(lora, tmp_path / "lora.gguf")
    got = llamacpp.logits_apart(tmp_path / "b.gguf", TOKENS, tmp_path, path)
    want = gguf_logits(llamacpp, model, tmp_path, "F32")
    # GELU comes from a table of float16, and a recurrence amplifies the last digit.
    is_coarse = architecture == "qwen35" or "gemma" in architecture
    assert difference(got, want) < (5e-5 if is_coarse else 5e-6)
    assert difference(llamacpp.logits_of(tmp_path / "b.gguf", TOKENS), want) > 1e-3


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype_is_read(llamacpp, tmp_path, rng, dtype):
    raw, weights = gguf_models.model("Q1_0", rng)
    model = merged(tmp_path, raw, weights, PROJECTIONS)
    want = checkpoint_logits(model, tmp_path)
    got = gguf_logits(llamacpp, model, tmp_path, dtype, is_widened=True)
    assert difference(got, want) < TOLERANCES[dtype]


@pytest.mark.parametrize("kind", NATIVE)
def test_tensors_that_stay_quantized_are_read(llamacpp, tmp_path, rng, kind):
    """llama.cpp rounds activations to 8 bits for quantized tensors, so this only shows that it loads
    and finds each tensor where it is."""
    raw, weights = gguf_models.model(kind, rng)
    model = merged(tmp_path, raw, weights, {"q_proj", "down_proj"})
    want = checkpoint_logits(model, tmp_path)
    assert difference(gguf_logits(llamacpp, model, tmp_path, "F16"), want) < 0.05


def test_an_untied_head(llamacpp, tmp_path, rng):
    raw, weights = gguf_models.model("Q1_0", rng, is_tied=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = merged(tmp_path, raw, weights, PROJECTIONS | {"lm_head"})
    want = checkpoint_logits(model, tmp_path)
    got = gguf_logits(llamacpp, model, tmp_path, "F32", is_widened=True)
    assert difference(got, want) < 5e-6


def test_a_split_base(llamacpp, tmp_path, rng):
    """llama.cpp reads the same parts as we do, and the merged file is a whole one."""
    raw, weights = gguf_models.model("F32", rng)
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(raw)
    (tmp_path / "split").mkdir()
    for end, part in gguf_files.parts_of(raw, (0, 10, 15)).items():
        (tmp_path / "split" / f"b{end}").write_bytes(part)
    split = llamacpp.logits_of(tmp_path / "split" / "b-00001-of-00003.gguf", TOKENS)
    assert np.array_equal(split, llamacpp.logits_of(whole, TOKENS))
    base = BaseFolder(tmp_path / "split").get("b")
    file = merged_files(MergedModel(base, []), Rendering("F32"))["b.gguf"]
    plain = llamacpp.logits_of(written(file, tmp_path / "plain.gguf"), TOKENS)
    assert np.array_equal(plain, split)
    model = MergedModel(base, ingredients(weights, PROJECTIONS))
    want = checkpoint_logits(model, tmp_path)
    assert difference(gguf_logits(llamacpp, model, tmp_path, "F32"), want) < 5e-6


def test_yarn_is_carried_over(llamacpp, tmp_path, rng):
    raw, weights = gguf_models.model(
        "Q1_0",
        rng,
        **{
            "qwen3.rope.scaling.type": "yarn",
            "qwen3.rope.scaling.factor": np.float32(4),
            "qwen3.rope.scaling.original_context_length": np.uint32(32),
        },
    )
    model = merged(tmp_path, raw, weights, PROJECTIONS)
    want = checkpoint_logits(model, tmp_path)
    got = gguf_logits(llamacpp, model, tmp_path, "F32", is_widened=True)
    assert difference(got, want) < 5e-6


def test_hub_files_are_the_checkpoint_in_bfloat16(tmp_path, rng):
    raw, weights = gguf_models.model("Q2_0", rng)
    model = merged(tmp_path, raw, weights, PROJECTIONS)
    config = json.loads(written(hub_files(model)["config.json"], tmp_path / "c").read_text())
    assert config["torch_dtype"] == "bfloat16"
    want = checkpoint_logits(model, tmp_path)
    (tmp_path / "again").mkdir()
    assert difference(checkpoint_logits(model, tmp_path / "again", "BF16"), want) < 2e-2


BY_NAME = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor([list(map(int, sys.argv[2].split()))])
for name in ("bases/bonsai-1.7b", "bonsai-1.7b/s"):
    model = AutoModelForCausalLM.from_pretrained(name)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        np.save(f"{sys.argv[1]}/{name.partition('/')[0]}.npy", model.float()(tokens).logits[0].numpy())
"""


def test_transformers_loads_by_name(settings, tmp_path, rng):
    raw, weights = gguf_models.model("Q1_0", rng)
    model = merged(tmp_path, raw, weights, PROJECTIONS)
    want = checkpoint_logits(model, tmp_path, "BF16")
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "bonsai-1.7b.gguf").write_bytes(raw)
    tensors, found = {}, model._ingredients[0].lora_set.registry.adapters
    for module, one in found.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = one.a_matrix
        tensors[f"base_model.model.{module}.lora_B.weight"] = one.b_matrix
    config = peft_config(target_modules=sorted(PROJECTIONS))
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    with serving(create_app(known)) as url:
        with httpx.Client(base_url=url) as client:
            assert upload_parts(client, "s", config, tensors).status_code == 201
        home = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", BY_NAME, str(tmp_path), " ".join(map(str, TOKENS))]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=110, env={**os.environ, **home}
        )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "bonsai-1.7b.npy"), want)
    assert difference(np.load(tmp_path / "bases.npy"), want) > 1e-3
