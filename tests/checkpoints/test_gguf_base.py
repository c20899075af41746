"""GGUF files as bases: their tensors under the names of a checkpoint, and merged files."""

import functools
import json
import os

import gguf_files
import gguf_hostile
import gguf_models
import ml_dtypes
import numpy as np
import pytest
import reference
from gguf_models import HEADS, KEYS
from hypothesis import settings

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
from bonsai_lora.checkpoints.merged_files import Rendering, hub_files, merged_files
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.merge import blocks
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import InvalidBaseError, UnsupportedAdapterError, UnsupportedGgufError
from bonsai_lora.formats import gguf, safetensors
from bonsai_lora.formats.dequantize import dequantize
from bonsai_lora.formats.gguf_names import ARCHITECTURES, Change, Heads, column_order
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.hadamard import PREFIX
from bonsai_lora.formats.peft_options import PLAIN, BaseOptions

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", *gguf_files.ENCODERS]
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
CONFIG = LoraConfig(2, 4.0)
ADAPTED = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
           "model.layers.1.mlp.down_proj"]  # fmt: skip
READ = settings(max_examples=40)


@pytest.fixture
def opened(tmp_path):
    """Opens the bytes of a GGUF file as the base `b`."""

    def open_(raw):
        (tmp_path / "b.gguf").write_bytes(raw)
        return BaseFolder(tmp_path).get("b")

    return open_


def adapters(weights, modules, rng, **options):
    """A set with an adapter for each module, of the size of its weight."""
    made = {}
    for module in modules:
        d_out, d_in = weights[f"{module}.weight"].shape
        a, b = rng.standard_normal((2, d_in)), rng.standard_normal((d_out, 2)) * 0.02
        made[module] = LoraAdapter(
            CONFIG, a.astype(np.float32), b.astype(np.float32), 2.0, **options
        )
    return made


def merge(base, made, replacements=None, options=PLAIN):
    one = BonsaiLoraSet(LoraRegistry(CONFIG, made), "", "s", replacements or {})
    return MergedModel(base, [Ingredient(one, '"s-1"', 1.0, options)])


def content(file):
    raw = b"".join(bytes(piece()) for piece in file.pieces(0, file.size_bytes))
    assert len(raw) == file.size_bytes
    return raw


def checkpoint_of(model, dtype="F32"):
    """The tensors and the configuration of the merged checkpoint."""
    files = merged_files(model, Rendering(dtype))
    tensors, metadata = safetensors.decode(content(files["model.safetensors"]))
    assert metadata == {"format": "pt"}, "without it, transformers refuses the file"
    return tensors, json.loads(content(files["config.json"]))


def gguf_of(model, dtype="F32", **options):
    """The header of the merged GGUF file, and its values by the file's names."""
    raw = content(merged_files(model, Rendering(dtype, **options))["b.gguf"])
    header = gguf.read_header(gguf.reader_of(raw), len(raw))
    values = {
        name: dequantize(one.type, raw[one.start : one.stop]).reshape(one.shape)
        for name, one in header.tensors.items()
    }
    return header, values


def with_tensors(raw, architecture, **more):
    """The file with further float32 tensors."""
    header = gguf.read_header(gguf.reader_of(raw), len(raw))
    tensors = {
        name: (one.type.name, one.shape, raw[one.start : one.stop])
        for name, one in header.tensors.items()
    }
    tensors |= {name: ("F32", one.shape, one.tobytes()) for name, one in more.items()}
    return gguf_files.file_of(gguf_models.keys_of(architecture), tensors)


def expected(weights, made):
    """The weights with deltas added in float64."""
    found = dict(weights)
    for module, one in made.items():
        name = f"{module}.weight"
        found[name] = reference.merge(weights[name], one.a_matrix, one.b_matrix, one.scaling)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_merged_and_unpacked(opened, rng, kind):
    raw, weights = gguf_models.model(kind, rng)
    base = opened(raw)
    assert base.dtypes == ({"F32": 25} if kind == "F32" else {kind: 16, "F32": 9})
    assert base.parameter_count == sum(one.size for one in weights.values())
    made = adapters(weights, ADAPTED, rng)
    tensors, _ = checkpoint_of(merge(base, made))
    assert tensors.keys() == weights.keys()
    for name, want in expected(weights, made).items():
        if name.removesuffix(".weight") in made:
            assert reference.relative_error(tensors[name], want) < 1e-6
        else:
            assert np.array_equal(tensors[name], want), name


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_is_unpacked_under_its_names(opened, rng, architecture):
    raw, weights = gguf_models.model("Q8_0", rng, architecture=architecture, is_tied=True)
    tensors, config = checkpoint_of(MergedModel(opened(raw), []))
    assert config["tie_word_embeddings"] is True
    assert tensors.keys() == weights.keys()
    for name, want in weights.items():
        assert tensors[name].shape == want.shape
        assert np.allclose(tensors[name], want, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_is_rounded_once(opened, rng, dtype):
    raw, weights = gguf_models.model("Q1_0", rng)
    made = adapters(weights, ADAPTED, rng)
    model = merge(opened(raw), made)
    exact, _ = checkpoint_of(model)
    rounded, config = checkpoint_of(model, dtype)
    assert config["torch_dtype"] == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    for name, one in exact.items():
        assert rounded[name].tobytes() == one.astype(DTYPES[dtype]).tobytes()


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "Q8_0"])
def test_a_gguf_file_has_changed_tensors_in_the_dtype(opened, rng, architecture, dtype):
    raw, weights = gguf_models.model("Q1_0", rng, architecture=architecture)
    stored = gguf.read_header(gguf.reader_of(raw), len(raw))
    made = adapters(weights, ADAPTED, rng)
    model = merge(opened(raw), made)
    header, values = gguf_of(model, dtype)
    want = expected(weights, made)
    names = {"blk.0.attn_q.weight": HEADS, "blk.1.attn_k.weight": KEYS, "blk.1.ffn_down.weight": 0}
    for name, one in stored.tensors.items():
        is_changed = name in names
        assert header.tensors[name].type.name == (dtype if is_changed else one.type.name)
        if not is_changed:
            assert np.array_equal(
                values[name].reshape(-1), dequantize(one.type, raw[one.start : one.stop])
            )
    error = {"F16": 5e-4, "BF16": 4e-3, "F32": 1e-6, "Q8_0": 1e-2}[dtype]
    for (name, heads), module in zip(names.items(), ADAPTED, strict=True):
        got = values[name]
        if architecture == "llama" and heads:
            got = gguf_models.unrotated(got, heads)
        assert reference.relative_error(got, want[f"{module}.weight"]) < error


def test_the_keys_of_a_gguf_file_are_true(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng, **{"tokenizer.ggml.tokens": ["a", "é"]})
    model = merge(opened(raw), adapters(weights, ADAPTED, rng))
    before = gguf.read_header(gguf.reader_of(raw), len(raw))
    mostly_one_bit, _ = gguf_of(model, "F16")
    widened, values = gguf_of(model, "F16", is_widened=True)
    assert mostly_one_bit.get("general.file_type") == 40
    assert widened.get("general.file_type") == 1
    assert {one.type.name for one in widened.tensors.values()} == {"F16", "F32"}
    assert [*widened.pairs] == [*before.pairs]
    assert widened.pairs["tokenizer.ggml.tokens"].count == 2
    for key in before.pairs.keys() - {"general.file_type"}:
        assert widened.get(key) == before.get(key)
    want = weights["model.layers.0.mlp.up_proj.weight"]
    assert np.array_equal(values["blk.0.ffn_up.weight"], want)


def test_the_configuration_is_made_from_the_keys(opened, rng):
    scaling = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": np.float32(4),
        "qwen3.rope.scaling.original_context_length": np.uint32(32),
    }
    raw, weights = gguf_models.model("Q1_0", rng, **scaling)
    _, config = checkpoint_of(merge(opened(raw), adapters(weights, ADAPTED, rng)))
    assert config == {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "attention_bias": False,
        "vocab_size": 96,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def test_rows_that_are_no_whole_blocks_become_f16(opened, rng):
    """As in llama.cpp's converter: a block of Q8_0 has 32 values."""
    names = {"ffn_up": (8, 40), "ffn_gate": (8, 64)}
    tensors = {
        f"blk.0.{name}.weight": ("F32", shape, np.ones(shape, np.float32).tobytes())
        for name, shape in names.items()
    }
    weights = {
        f"model.layers.0.mlp.{one}_proj.weight": np.ones(names[f"ffn_{one}"])
        for one in ("up", "gate")
    }
    base = opened(gguf_files.file_of(gguf_models.keys_of("qwen3"), tensors))
    made = adapters(weights, [name.removesuffix(".weight") for name in weights], rng)
    header, values = gguf_of(merge(base, made), "Q8_0")
    kinds = {name: one.type.name for name, one in header.tensors.items()}
    assert kinds == {"blk.0.ffn_up.weight": "F16", "blk.0.ffn_gate.weight": "Q8_0"}
    want = expected(weights, made)["model.layers.0.mlp.up_proj.weight"]
    assert reference.relative_error(values["blk.0.ffn_up.weight"], want) < 5e-4


def test_a_tied_head_that_is_adapted_becomes_a_tensor(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng, is_tied=True)
    base = opened(raw)
    assert base.is_tied
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding
    made = adapters(weights, ["lm_head"], rng)
    model = merge(base, made)
    tensors, config = checkpoint_of(model)
    assert config["tie_word_embeddings"] is False
    assert np.array_equal(tensors["model.embed_tokens.weight"], embedding)
    want = expected(weights, made)["lm_head.weight"]
    assert reference.relative_error(tensors["lm_head.weight"], want) < 1e-6
    header, values = gguf_of(model, "F16")
    assert header.tensors["token_embd.weight"].type.name == "Q1_0"
    assert header.tensors["output.weight"].type.name == "F16"
    assert reference.relative_error(values["output.weight"], want) < 5e-4


def test_the_head_of_a_tied_base_stays_when_the_embedding_is_adapted(opened, rng):
    raw, weights = gguf_models.model("Q2_0", rng, is_tied=True)
    embedding = weights["model.embed_tokens.weight"]
    a, b = rng.standard_normal((2, 96)), rng.standard_normal((256, 2))
    made = {
        "model.embed_tokens": LoraAdapter(
            CONFIG, a.astype(np.float32), b.astype(np.float32), 2.0, layer="embedding"
        )
    }
    header, values = gguf_of(merge(opened(raw), made), "F32")
    assert header.tensors["output.weight"].type.name == "Q2_0"
    assert np.array_equal(values["output.weight"], embedding)
    want = embedding + 2.0 * (b @ a).T
    assert reference.relative_error(values["token_embd.weight"], want) < 1e-6


def test_a_tied_base_stays_tied_otherwise(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng, is_tied=True)
    model = merge(opened(raw), adapters(weights, ADAPTED, rng))
    tensors, config = checkpoint_of(model)
    assert config["tie_word_embeddings"] is True
    assert tensors.keys() == weights.keys()
    assert "output.weight" not in gguf_of(model)[0].tensors


def test_replaced_rows_of_a_tied_embedding_are_those_of_the_head(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng, is_tied=True)
    rows = rng.standard_normal((2, 256)).astype(np.float32)
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    model = merge(opened(raw), {}, {name: rows}, BaseOptions(token_indices=(3, 5)))
    tensors, config = checkpoint_of(model)
    want = weights["model.embed_tokens.weight"].copy()
    want[[3, 5]] = rows
    assert config["tie_word_embeddings"] is True
    assert np.array_equal(tensors["model.embed_tokens.weight"], want)
    assert "lm_head.weight" not in tensors


def test_replaced_vectors_are_stored_as_before(opened, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    norm = rng.standard_normal(256).astype(np.float32)
    model = merge(opened(raw), {}, {"model.layers.1.input_layernorm.weight": norm})
    header, values = gguf_of(model, "F16")
    assert header.tensors["blk.1.attn_norm.weight"].type.name == "F32"
    assert np.array_equal(values["blk.1.attn_norm.weight"], norm)


def test_dora_is_computed_from_dequantized_rows(opened, rng):
    raw, weights = gguf_models.model("TQ2_0", rng, architecture="llama")
    module = ADAPTED[0]
    magnitude = rng.uniform(0.5, 2, 256).astype(np.float32)
    made = adapters(weights, [module], rng, magnitude=magnitude)
    tensors, _ = checkpoint_of(merge(opened(raw), made))
    total = expected(weights, made)[f"{module}.weight"]
    want = total * (magnitude / np.linalg.norm(total, axis=1))[:, None]
    assert reference.relative_error(tensors[f"{module}.weight"], want) < 1e-6


def test_experts_are_tensors_of_their_own(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng, architecture="qwen3moe")
    module = "model.layers.1.mlp.experts.2.up_proj"
    made = adapters(weights, [module, "model.layers.0.mlp.gate"], rng)
    model = merge(opened(raw), made)
    tensors, config = checkpoint_of(model)
    assert config["num_experts"] == 4
    want = expected(weights, made)
    assert tensors.keys() == want.keys()
    for name, values in want.items():
        assert reference.relative_error(tensors[name], values) < 1e-6
    _, stacks = gguf_of(model, "F32")
    for number in range(4):
        name = f"model.layers.1.mlp.experts.{number}.up_proj.weight"
        assert (
            reference.relative_error(stacks["blk.1.ffn_up_exps.weight"][number], want[name]) < 1e-6
        )


def test_a_folded_base_is_unfolded_as_a_whole(opened, rng):
    raw, weights = gguf_models.folded(rng)
    made = adapters(weights, ADAPTED, rng)
    base = opened(raw)
    model = merge(base, made)
    want = expected(weights, made)
    tensors, _ = checkpoint_of(model)
    for name, values in want.items():
        assert reference.relative_error(tensors[name], values) < 1e-6
    header, values = gguf_of(model, "F32")
    assert not [key for key in header.pairs if key.startswith(PREFIX)]
    for layer in range(2):
        for part in ("gate", "up", "down"):
            got = values[f"blk.{layer}.ffn_{part}.weight"]
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            assert reference.relative_error(got, want[name]) < 1e-6
    assert header.tensors["blk.0.attn_v.weight"].type.name == "Q2_0"
    assert base.folding is not None


@pytest.mark.parametrize("is_grouped", [False, True])
def test_columns_that_a_folded_file_leaves_in_order(opened, rng, is_grouped):
    """llama.cpp reads the columns of ssm_out in GGUF's order, whatever the folded file says."""
    theirs = rng.standard_normal((256, 384)).astype(np.float32)
    heads = Heads(linear_keys=2, linear_values=6)
    order = column_order(Change.V_COLUMNS, heads, 384)
    stored = theirs if is_grouped else np.ascontiguousarray(theirs[:, order])
    keys = {
        "general.architecture": "qwen35",
        "qwen35.ssm.group_count": np.uint32(2),
        "qwen35.ssm.time_step_rank": np.uint32(6),
        f"{PREFIX}version": np.uint32(1),
        f"{PREFIX}block_size": np.uint32(1),
        f"{PREFIX}transform": "normalized-sylvester-walsh-hadamard",
        f"{PREFIX}axis": "input-last-dimension",
        f"{PREFIX}sign_mode": "identity",
        f"{PREFIX}weight_names": ["blk.0.ssm_out.weight"],
        f"{PREFIX}gdn_v_grouped": is_grouped,
    }
    tensors = {"blk.0.ssm_out.weight": ("F32", theirs.shape, stored.tobytes())}
    name = "model.layers.0.linear_attn.out_proj"
    for made in (adapters({f"{name}.weight": theirs}, [name], rng), {}):
        base = opened(gguf_files.file_of(keys, tensors))
        model = merge(base, made) if made else MergedModel(base, [])
        want = expected({f"{name}.weight": theirs}, made)[f"{name}.weight"]
        files = merged_files(model, Rendering("F32"))
        got = safetensors.decode(content(files["model.safetensors"]))[0][f"{name}.weight"]
        assert reference.relative_error(got, want) < 1e-6
        _, values = gguf_of(model, "F32")
        assert reference.relative_error(values["blk.0.ssm_out.weight"], want[:, order]) < 1e-6


LINEAR = [f"model.layers.0.linear_attn.{one}" for one in ("in_proj_qkv", "out_proj")]
STACK = [f"model.layers.1.mlp.experts.{one}.up_proj" for one in (0, 3)]
KINDS_OF_BASES = {
    "tied, rotated": ("Q1_0", "llama", {}, [*ADAPTED, "lm_head"]),
    "experts": ("Q4_0", "qwen3moe", {}, STACK),
    "linear attention": ("Q8_0", "qwen35", {}, LINEAR),
    "not aligned": ("TQ1_0", "qwen3", {"general.alignment": np.uint32(1)}, ADAPTED),
    "folded": (None, "qwen3", {"general.alignment": np.uint32(4096)}, ADAPTED[:1]),
    "no set": ("Q6_K", "phi3", {}, []),
}
"""Bases and adapted modules that between them use every way to compute a part of a file."""


def of_kind(kind, rng):
    type_, architecture, keys, modules = KINDS_OF_BASES[kind]
    if type_ is None:
        raw, weights = gguf_models.folded(rng, **keys)
    else:
        raw, weights = gguf_models.model(
            type_, rng, architecture=architecture, is_tied=architecture == "llama", **keys
        )
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return raw, adapters(weights, modules, rng)


@pytest.mark.parametrize(
    ("name", "dtype", "is_widened"),
    [
        ("b.gguf", "F16", False),
        ("b.gguf", "F32", False),
        ("b.gguf", "Q8_0", True),
        ("model.safetensors", "BF16", False),
    ],
)
@pytest.mark.parametrize("kind", KINDS_OF_BASES)
def test_any_range_is_a_slice_of_the_whole(tmp_path, monkeypatch, kind, name, dtype, is_widened):
    raw, made = of_kind(kind, np.random.default_rng(3))
    (tmp_path / "b.gguf").write_bytes(raw)
    base = BaseFolder(tmp_path).get("b")
    model = merge(base, made) if made else MergedModel(base, [])
    whole = content(merged_files(model, Rendering(dtype, is_widened=is_widened))[name])
    # Tiny tensors are one block each, unless blocks are smaller.
    smaller = functools.partial(blocks, most=3 * 512)
    monkeypatch.setattr("bonsai_lora.checkpoints.parts.blocks", smaller)
    file = merged_files(model, Rendering(dtype, is_widened=is_widened))[name]
    assert file.size_bytes == len(whole)
    rng = np.random.default_rng(5)
    starts = rng.integers(0, len(whole), 25)
    for start, size in zip(starts, rng.integers(1, 20_000, 25), strict=True):
        stop = min(len(whole), int(start) + int(size))
        got = b"".join(bytes(one()) for one in file.pieces(int(start), stop))
        assert got == whole[start:stop]


def test_files_are_the_same_after_a_restart(tmp_path, rng):
    raw, weights = gguf_models.model("Q1_0", rng)
    (tmp_path / "b.gguf").write_bytes(raw)
    made = adapters(weights, ADAPTED, rng)

    def etags(**options):
        files = merged_files(merge(BaseFolder(tmp_path).get("b"), made), Rendering(**options))
        return {name: one.etag for name, one in files.items()}

    first = etags(dtype="F16")
    assert first == etags(dtype="F16")
    assert len({*first.values()}) == len(first)
    others = etags(dtype="BF16"), etags(dtype="F16", is_widened=True)
    assert first["b.gguf"] not in [one["b.gguf"] for one in others]


def test_a_large_checkpoint_is_divided_with_an_index(opened, rng, monkeypatch):
    monkeypatch.setattr("bonsai_lora.checkpoints.hugging_face.SHARD_BYTES", 600_000)
    raw, weights = gguf_models.model("Q1_0", rng)
    base = opened(raw)
    model = merge(base, adapters(weights, ADAPTED, rng))
    files = hub_files(model)
    index = json.loads(content(files["model.safetensors.index.json"]))
    shards = sorted({*index["weight_map"].values()})
    assert shards == [one for one in files if one.endswith(".safetensors")]
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    found, sizes = {}, []
    for shard in shards:
        tensors = safetensors.decode(content(files[shard]))[0]
        assert {index["weight_map"][name] for name in tensors} == {shard}
        if sizes:  # the one before had no place for the first tensor of this one
            assert sizes[-1] + next(iter(tensors.values())).nbytes > 600_000
        sizes.append(sum(one.nbytes for one in tensors.values()))
        assert sizes[-1] <= 600_000
        found |= tensors
    assert found.keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(sizes)
    for limit, is_one in ((sum(sizes), True), (sum(sizes) - 1, False)):
        monkeypatch.setattr("bonsai_lora.checkpoints.hugging_face.SHARD_BYTES", limit)
        files = hub_files(merge(base, adapters(weights, ADAPTED, rng)))
        assert ("model.safetensors" in files) == is_one
        assert ("model.safetensors.index.json" in files) == (not is_one)


def test_files_beside_the_gguf_file_belong_to_the_checkpoint(tmp_path, rng):
    raw, weights = gguf_models.model("Q1_0", rng)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "any-name.gguf").write_bytes(raw)
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    model = merge(BaseFolder(tmp_path).get("b"), adapters(weights, ADAPTED, rng))
    files = merged_files(model)
    assert [*files] == ["b.gguf", "config.json", "model.safetensors", "tokenizer.json"]
    assert content(files["tokenizer.json"]) == b"{}"


def test_a_vision_tower_beside_the_gguf_file_is_ignored(tmp_path, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "Bonsai-27B-Q1_0.gguf").write_bytes(raw)
    (tmp_path / "b" / "Bonsai-27B-mmproj-Q8_0.gguf").write_bytes(b"not read")
    base = BaseFolder(tmp_path).get("b")
    assert [*base.files] == ["Bonsai-27B-Q1_0.gguf"]
    assert base.ignored == ["Bonsai-27B-mmproj-Q8_0.gguf"]
    assert base.parameter_count


def test_a_configuration_beside_the_gguf_file_is_preferred(tmp_path, rng):
    """It makes checkpoints of files whose keys do not say enough, and stays true to the weights."""
    raw, weights = gguf_models.model("Q1_0", rng, architecture="llama", is_tied=True)
    raw = with_tensors(raw, "llama", **{"rope_freqs.weight": np.ones(32, np.float32)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.gguf").write_bytes(raw)
    base = BaseFolder(tmp_path).get("b")
    with pytest.raises(UnsupportedGgufError, match=r"rope_freqs\.weight.*config\.json"):
        hub_files(MergedModel(base, []))
    own = {"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}, "torch_dtype": "float16"}
    (tmp_path / "b" / "config.json").write_text(json.dumps(own))
    base = BaseFolder(tmp_path).get("b")
    files = hub_files(MergedModel(base, []))
    expected = {**own, "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    assert json.loads(content(files["config.json"])) == expected
    tensors = safetensors.decode(content(files["model.safetensors"]))[0]
    assert tensors.keys() == weights.keys()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    files = hub_files(merge(base, adapters(weights, ["lm_head"], rng)))
    assert json.loads(content(files["config.json"]))["tie_word_embeddings"] is False


@pytest.mark.parametrize("text", ["[1]", "{", "", '{"a": ' * 100_000])
def test_a_malformed_configuration_is_not_used(tmp_path, rng, text):
    raw, _ = gguf_models.model("Q1_0", rng)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.gguf").write_bytes(raw)
    (tmp_path / "b" / "config.json").write_text(text)
    files = hub_files(MergedModel(BaseFolder(tmp_path).get("b"), []))
    assert json.loads(content(files["config.json"]))["model_type"] == "qwen3"


def test_a_tensor_without_a_name_stays_in_the_gguf_file_alone(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng)
    raw = with_tensors(raw, "qwen3", **{"blk.0.attn_sinks.weight": np.ones(32, np.float32)})
    model = merge(opened(raw), adapters(weights, ADAPTED, rng))
    assert [*merged_files(model)] == ["b.gguf"]
    assert (gguf_of(model)[1]["blk.0.attn_sinks.weight"] == 1).all()
    with pytest.raises(UnsupportedGgufError, match=r"attn_sinks\.weight.*GGUF file"):
        hub_files(model)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("ffn_up_exps", (4, 32)), ("ffn_up", (2, 4, 32)), ("ffn_up_exps", (2, 4, 8, 32))],
)
def test_only_a_stack_of_matrices_is_one_of_experts(opened, name, shape):
    tensors = {f"blk.0.{name}.weight": ("F32", shape, bytes(4 * int(np.prod(shape))))}
    base = opened(gguf_files.file_of(gguf_models.keys_of("qwen3moe"), tensors))
    assert not [one for one in base.tensor_names if ".experts." in one]


def test_types_without_a_decoder_are_copied_or_refused(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng)
    header = gguf.read_header(gguf.reader_of(raw), len(raw))
    tensors = {
        name: (one.type.name, one.shape, raw[one.start : one.stop])
        for name, one in header.tensors.items()
    }
    kind = BY_NAME["Q5_K"]
    tensors["blk.0.attn_v.weight"] = ("Q5_K", (128, 256), bytes(kind.bytes_of(128 * 256)))
    base = opened(gguf_files.file_of(gguf_models.keys_of("qwen3"), tensors))
    model = merge(base, adapters(weights, ADAPTED, rng))
    assert [*merged_files(model)] == ["b.gguf"]
    assert content(merged_files(model)["b.gguf"])
    with pytest.raises(UnsupportedGgufError, match="Q5_K"):
        merged_files(model, Rendering(is_widened=True))
    with pytest.raises(UnsupportedAdapterError, match="Q5_K"):
        merge(base, adapters(weights, ["model.layers.0.self_attn.v_proj"], rng))


@pytest.mark.parametrize("name", sorted(gguf_hostile.CASES))
def test_hostile_files_are_no_bases(opened, name):
    with pytest.raises(InvalidBaseError, match=r"b\.gguf of base 'b'"):
        opened(gguf_hostile.CASES[name][0])


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"general.type": "adapter"}, "upload adapters as sets"),
        ({"split.count": np.uint16(3)}, r"split\.count is 3.*llama-gguf-split"),
        ({f"{PREFIX}version": np.uint32(9)}, "Hadamard"),
        ({"general.alignment": np.uint32(1 << 17)}, "131072, more than 65536"),
    ],
)
def test_files_that_are_no_whole_model_are_refused(opened, rng, keys, reason):
    raw, _ = gguf_models.model("Q1_0", rng, **keys)
    with pytest.raises(InvalidBaseError, match=reason):
        opened(raw)


def test_the_largest_alignment_is_served(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng, **{"general.alignment": np.uint32(1 << 16)})
    model = merge(opened(raw), adapters(weights, ADAPTED, rng))
    assert gguf_of(model)[0].alignment == 1 << 16


@pytest.mark.parametrize("more", [0, 1])
def test_experts_are_counted_before_they_have_names(opened, more):
    """Two stacks of 65,536 experts of one weight each, and one more."""
    stacks = {
        f"blk.{layer}.ffn_up_exps.weight": ("F32", (count, 1, 1), bytes(4 * count))
        for layer, count in enumerate(((1 << 16) + more, 1 << 16))
    }
    raw = gguf_files.file_of(gguf_models.keys_of("qwen3moe"), stacks)
    if more:
        with pytest.raises(InvalidBaseError, match="131073 experts, more than 131072"):
            opened(raw)
    else:
        base = opened(raw)
        assert len(base.tensor_names) == 1 << 17
        assert base.info("model.layers.1.mlp.experts.65535.up_proj.weight").shape == (1, 1)


def test_an_unknown_architecture_is_listed_but_not_merged(opened, rng):
    raw, weights = gguf_models.model("Q1_0", rng)
    header = gguf.read_header(gguf.reader_of(raw), len(raw))
    tensors = {
        name: (one.type.name, one.shape, raw[one.start : one.stop])
        for name, one in header.tensors.items()
    }
    base = opened(gguf_files.file_of(gguf_models.keys_of("mamba"), tensors))
    assert base.architecture == "mamba"
    with pytest.raises(UnsupportedGgufError, match=r"'mamba'.*qwen3"):
        merge(base, adapters(weights, ADAPTED, rng))


def test_all_of_a_long_header_identifies_a_base(tmp_path):
    """Of the rest of a file, samples do."""
    digests, path = set(), tmp_path / "b.gguf"
    for place in (None, 1_300_000, 2_300_000):
        labels = np.zeros(3_000_000, np.int8)
        labels[place or 0] = place is not None
        raw, _ = gguf_models.model("Q1_0", np.random.default_rng(1), **{"general.labels": labels})
        path.write_bytes(raw)
        os.utime(path, ns=(10**18, 10**18))
        base = BaseFolder(tmp_path).get("b")
        assert base.header.data_start > 3_000_000
        digests.add(base.digest)
    assert len(digests) == 3


def test_names_that_clash_are_refused_with_the_reason(tmp_path, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    (tmp_path / "b").mkdir()
    for name in ("b.gguf", "b/one.gguf", "b/two.gguf", "c.gguf"):
        (tmp_path / name).write_bytes(raw)
    bases = BaseFolder(tmp_path)
    assert bases.names() == ["b", "c"]
    with pytest.raises(InvalidBaseError, match=r"both a folder and the file b\.gguf") as caught:
        bases.get("b")
    assert caught.value.values == {"base": "b"}
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(InvalidBaseError, match=r"2 GGUF files: one\.gguf, two\.gguf") as caught:
        bases.get("b")
    assert caught.value.values == {"base": "b"}
    (tmp_path / "b" / "two.gguf").unlink()
    assert bases.get("b").format == "gguf"
    assert bases.get("b") is bases.get("b")
