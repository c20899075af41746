"""config.json made from keys: what is refused. The peer tests compare its effect with llama.cpp."""

import gguf_files
import gguf_models
import numpy as np
import pytest

from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats import gguf
from bonsai_lora.formats.gguf_config import MODEL_TYPES, config_of
from bonsai_lora.formats.gguf_names import ARCHITECTURES


def config(rng, architecture="qwen3", *, without=(), tensors=None, **keys):
    """The configuration of a tiny model with some keys and tensors added, or left out."""
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    raw, _ = gguf_models.model("Q1_0", rng, architecture=architecture, **own)
    read = gguf.reader_of(raw)
    header = gguf.read_header(read, len(raw))
    found = {
        name: (one.type.name, one.shape, raw[one.start : one.stop])
        for name, one in header.tensors.items()
        if name not in without
    }
    pairs = gguf_models.keys_of(architecture, **own)
    pairs = {key: value for key, value in pairs.items() if key not in without}
    raw = gguf_files.file_of(pairs, {**found, **(tensors or {})})
    read = gguf.reader_of(raw)
    return config_of(gguf.read_header(read, len(raw)), read, dtype="BF16", is_tied=False)


def test_every_architecture_with_names_has_a_configuration(rng):
    assert MODEL_TYPES.keys() == ARCHITECTURES
    for architecture, model_type in MODEL_TYPES.items():
        found = config(rng, architecture)
        assert found["model_type"] == model_type
        assert found["num_hidden_layers"] == (4 if architecture == "qwen35" else 2)


TABLE = {"rope_freqs.weight": ("F32", (32,), np.ones(32, np.float32).tobytes())}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"without": ["qwen3.block_count"]}, r"qwen3\.block_count is missing"),
        ({"without": ["qwen3.embedding_length"]}, r"qwen3\.embedding_length is missing"),
        ({"without": ["qwen3.feed_forward_length"]}, r"qwen3\.feed_forward_length is missing"),
        ({"without": ["qwen3.attention.head_count"]}, r"attention\.head_count is missing"),
        (
            {"without": ["qwen3.attention.layer_norm_rms_epsilon"]},
            r"layer_norm_rms_epsilon is missing",
        ),
        ({"without": ["token_embd.weight"]}, r"token_embd\.weight is missing"),
        ({"block_count": np.uint64(2**63)}, r"qwen3\.block_count does not fit the tensors"),
        ({"block_count": np.uint32(0)}, r"qwen3\.block_count is 0"),
        ({"block_count": np.float32(2)}, r"block_count is '2\.0', not one whole number"),
        ({"block_count": True}, r"block_count is 'True'"),
        ({"nextn_predict_layers": np.uint32(2)}, r"block_count does not fit"),
        ({"embedding_length": np.int32(-1)}, r"embedding_length is '-1'"),
        ({"attention__head_count": np.array([4, 4], np.int32)}, r"head_count is an array"),
        (
            {"attention__layer_norm_rms_epsilon": np.float32("nan")},
            r"epsilon is 'nan', not a finite number",
        ),
        (
            {"architecture": "phi3", "attention__head_count": np.uint32(2**31)},
            r"phi3\.embedding_length is less than the heads",
        ),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": np.float64(1e300)},
            r"factor is '1e\+300', not a finite number",
        ),
        ({"rope__dimension_count": np.uint32(32)}, r"32 of the 64 values of a head are rotated"),
        ({"rope__scaling__type": "longrope", "rope__scaling__factor": np.float32(4)}, "longrope"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": "4"}, r"factor is '4'"),
        ({"tensors": TABLE}, r"rope_freqs\.weight does not say how"),
        (
            {
                "architecture": "gemma3",
                "attention__sliding_window_pattern": np.ones(1, np.uint8),
            },
            "has 1 values, not 2 numbers",
        ),
        (
            {"architecture": "gemma3", "attention__sliding_window_pattern": ["a", "b"]},
            "has 2 values, not 2 numbers",
        ),
        ({"architecture": "phi3", "without": ["rope_factors_long.weight"]}, "is missing"),
        ({"architecture": "qwen35", "without": ["qwen35.ssm.inner_size"]}, "inner_size is missing"),
        ({"architecture": "qwen3moe", "without": ["qwen3moe.expert_count"]}, "expert_count"),
    ],
)
def test_what_the_keys_do_not_say_is_refused(rng, options, reason):
    with pytest.raises(UnsupportedGgufError, match=rf"{reason}.*put the model's config\.json"):
        config(rng, **options)


def test_defaults_are_those_of_llamacpp(rng):
    """Classes of transformers have others: a head_dim of 128, a base of a million."""
    left_out = ["attention.key_length", "attention.head_count_kv", "rope.freq_base"]
    found = config(rng, without=[f"qwen3.{key}" for key in left_out])
    assert (found["head_dim"], found["num_key_value_heads"], found["rope_theta"]) == (64, 4, 1e4)


def test_kinds_of_layers_come_from_arrays_too(rng):
    found = config(rng, "gemma3", attention__sliding_window_pattern=np.array([False, True]))
    assert found["layer_types"] == ["full_attention", "sliding_attention"]
    flags = np.array([1, 0, 1, 0, 0], np.int32)
    found = config(rng, "qwen35", attention__recurrent_layers=flags)
    assert found["layer_types"] == ["linear_attention", "full_attention"] * 2


def test_kinds_of_layers_come_from_numbers(rng):
    alternating = ["sliding_attention", "full_attention"]
    assert config(rng, "gemma3")["layer_types"] == alternating, "the file says 2"
    assert config(rng, "gemma2")["layer_types"] == alternating, "the default"
    left_out = ["gemma3.attention.sliding_window_pattern"]
    assert config(rng, "gemma3", without=left_out)["layer_types"] == alternating[:1] * 2
    found = config(rng, "gemma3", attention__sliding_window=np.uint32(0))
    assert found["layer_types"] == alternating[1:] * 2


def test_tokens_outside_of_the_vocabulary_are_left_out(rng):
    raw, _ = gguf_models.model(
        "Q1_0",
        rng,
        **{
            "tokenizer.ggml.eos_token_id": np.uint32(95),
            "tokenizer.ggml.padding_token_id": np.uint32(96),
            "tokenizer.ggml.bos_token_id": "a",
        },
    )
    read = gguf.reader_of(raw)
    found = config_of(gguf.read_header(read, len(raw)), read, dtype="F16", is_tied=True)
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == (95, None, None)
