"""GGUF LoRA exports in llama.cpp (xllamacpp) against peft and transformers."""

import json

import gguf_files
import llamacpp
import numpy as np
import pytest
from conftest import TINY, read_tensors, upload, upload_parts

from bonsai_lora.core.cast import to_float32
from bonsai_lora.formats.gguf_names import Heads, row_order, to_gguf

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

pytest.importorskip("xllamacpp")
TOLERANCE = 5e-6
"""Of the logits' standard deviation; without an adapter, llama.cpp and torch differ by 1.3e-6."""


def pairs_of(architecture, config):
    head_dim = config["head_dim"]
    numbers = {
        "block_count": config["num_hidden_layers"],
        "context_length": 256,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": head_dim,
        "expert_count": config.get("num_experts", config.get("num_local_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        **{f"{architecture}.{key}": np.uint32(one) for key, one in numbers.items() if one},
        f"{architecture}.attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": np.float32(config["rope_parameters"]["rope_theta"]),
        "tokenizer.ggml.model": "no_vocab",
    }


def write_base(path, architecture, config, tensors):
    """Write a checkpoint as F32 GGUF, as llama.cpp's converter would."""
    heads = Heads(config["num_attention_heads"], config["num_key_value_heads"])
    found, stacks = {}, {}
    for name, tensor in tensors.items():
        values = to_float32(tensor)
        theirs = to_gguf(architecture, name)
        order = row_order(theirs.change, heads, len(values))
        values = values if order is None else values[order]
        if theirs.expert is None:
            found[theirs.name] = values
        else:
            stacks.setdefault(theirs.name, {})[theirs.expert] = values
    found |= {name: np.stack([one[e] for e in range(len(one))]) for name, one in stacks.items()}
    contents = {name: ("F32", one.shape, one.tobytes()) for name, one in found.items()}
    path.write_bytes(gguf_files.file_of(pairs_of(architecture, config), contents))
    return path


def spread(got, expected):
    return np.abs(got - expected).max() / expected.std()


def checkpoint(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= read_tensors(file)
    return json.loads((folder / "config.json").read_text()), tensors


@pytest.fixture
def tiny(tmp_path):
    return write_base(tmp_path / "base.gguf", "qwen3", *checkpoint(TINY / "base"))


@pytest.mark.parametrize("adapter", ["plain", "rslora-patterns", "attention-only"])
def test_llamacpp_computes_what_peft_computes(based, adapter, tiny, tmp_path):
    upload(based, adapter, TINY / adapter)
    answer = based.get(f"/v1/sets/{adapter}/adapter.gguf?architecture=qwen3")
    assert answer.status_code == 200, answer.text
    (tmp_path / "lora.gguf").write_bytes(answer.content)
    expected = read_tensors(TINY / adapter / "golden.safetensors")["logits"]
    tokens = np.load(TINY / "tokens.npy")
    for row, wanted in zip(tokens, expected, strict=True):
        got = llamacpp.logits_apart(tiny, row, tmp_path, tmp_path / "lora.gguf")
        assert spread(got, wanted) < TOLERANCE
    assert spread(llamacpp.logits_apart(tiny, tokens[-1], tmp_path), expected[-1]) > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 5e-3), ("BF16", 4e-2), ("Q8_0", 8e-2)])
def test_llamacpp_reads_every_type(based, dtype, tolerance, tiny, tmp_path):
    """llama.cpp also rounds the inputs to the adapter's type: 3.4e-3, 2.6e-2, 6.1e-2 measured."""
    upload(based, "plain", TINY / "plain")
    path = f"/v1/sets/plain/adapter.gguf?architecture=qwen3&dtype={dtype}"
    (tmp_path / "lora.gguf").write_bytes(based.get(path).content)
    expected = read_tensors(TINY / "plain/golden.safetensors")["logits"][0]
    tokens = np.load(TINY / "tokens.npy")[0]
    got = llamacpp.logits_apart(tiny, tokens, tmp_path, tmp_path / "lora.gguf")
    assert spread(got, expected) < tolerance


def made_model(kind, folder):
    """Save a small random model; return its GGUF architecture and the model."""
    import torch
    import transformers

    torch.manual_seed(1)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes)
        model = transformers.LlamaForCausalLM(config)
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        config = transformers.Qwen3MoeConfig(**sizes, **experts, norm_topk_prob=True)
        model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


def random_adapter(tensors, rng):
    """An adapter of every matrix, embedding and head included, and the merged checkpoint."""
    adapters, merged = {}, dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            is_embedding = "embed_tokens" in name
            d_out, d_in = tensor.shape[::-1] if is_embedding else tensor.shape
            a_matrix = rng.standard_normal((3, d_in)).astype(np.float32) / 10
            b_matrix = rng.standard_normal((d_out, 3)).astype(np.float32) / 10
            half = f"{module}.lora_embedding_{{}}" if is_embedding else f"{module}.lora_{{}}.weight"
            adapters |= {half.format("A"): a_matrix, half.format("B"): b_matrix}
            delta = 2 * (b_matrix @ a_matrix)
            merged[name] = to_float32(tensor) + (delta.T if is_embedding else delta)
    return adapters, merged


@pytest.mark.parametrize("kind", ["llama", "qwen3moe"])
def test_heads_and_experts(based, kind, rng, tmp_path):
    """Permuted rows of llama, one adapter per expert of qwen3moe, an untied embedding and head."""
    import torch

    folder = tmp_path / "bases" / "other"
    model = made_model(kind, folder)
    config, tensors = checkpoint(folder)
    adapters, merged = random_adapter(tensors, rng)
    base = write_base(tmp_path / "base.gguf", kind, config, tensors)
    whole = write_base(tmp_path / "whole.gguf", kind, config, merged)
    peft = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "other",
        "target_modules": sorted(
            {name.partition(".lora_")[0].rpartition(".")[2] for name in adapters}
        ),
    }  # fmt: skip
    assert upload_parts(based, "mine", peft, adapters).status_code == 201
    answer = based.get("/v1/sets/mine/adapter.gguf")
    assert answer.status_code == 200, answer.text
    (tmp_path / "lora.gguf").write_bytes(answer.content)
    tokens = np.arange(20) * 7 % 128
    with torch.no_grad():
        plain = model(torch.from_numpy(tokens[None])).logits[0].numpy()
    assert spread(llamacpp.logits_apart(base, tokens, tmp_path), plain) < TOLERANCE
    got = llamacpp.logits_apart(base, tokens, tmp_path, tmp_path / "lora.gguf")
    assert spread(got, llamacpp.logits_apart(whole, tokens, tmp_path)) < TOLERANCE
    assert spread(got, plain) > 1e-2
    again = based.put("/v1/sets/back", files={"adapter_gguf": answer.content})
    assert again.status_code == 201, again.text
    assert again.json()["base_model_name"] == "other"
    back = based.get("/v1/sets/back/adapter_model.safetensors").content
    (tmp_path / "back.safetensors").write_bytes(back)
    found = read_tensors(tmp_path / "back.safetensors")
    assert found.keys() == adapters.keys()
    assert all(np.array_equal(found[name], one) for name, one in adapters.items())
