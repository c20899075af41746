"""Tokenizer files made from the keys of a GGUF file."""

import json

import gguf_files
import numpy as np
import pytest

from bonsai_lora.formats import gguf
from bonsai_lora.formats.gguf_tokenizer import tokenizer_files

TOKENS = ["a", "b", "ab", "é", "<|end|>", "<tool>", "[PAD6]"]
KEYS = {
    "general.architecture": "qwen3",
    "qwen3.context_length": np.uint32(64),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array([1, 1, 1, 1, 3, 4, 5], np.int32),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": np.uint32(4),
    "tokenizer.ggml.padding_token_id": np.uint32(99),
    "tokenizer.chat_template": "{{ messages }}",
}


def made(**changes):
    keys = {key: one for key, one in {**KEYS, **changes}.items() if one is not None}
    raw = gguf_files.file_of(keys, {"x": ("F32", (1,), bytes(4))})
    read = gguf.reader_of(raw)
    files = tokenizer_files(gguf.read_header(read, len(raw)), read)
    return {name: json.loads(one) for name, one in files.items()}


def test_vocabulary_and_special_tokens():
    tokenizer = made()["tokenizer.json"]
    assert tokenizer["model"]["vocab"] == {one: n for n, one in enumerate(TOKENS[:6])}
    assert tokenizer["model"]["merges"] == ["a b"]
    found = {one["id"]: (one["content"], one["special"]) for one in tokenizer["added_tokens"]}
    assert found == {4: ("<|end|>", True), 5: ("<tool>", False)}


def test_configuration():
    assert made()["tokenizer_config.json"] == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages }}",
        "model_max_length": 64,
        "eos_token": "<|end|>",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "llama"),
        ("pre", "llama-bpe"),
        ("add_bos_token", True),
        ("tokens", None),
        ("tokens", np.arange(7)),
        ("tokens", ["a", "a", "ab", "é", "x", "y", "z"]),
        ("tokens", TOKENS[:5]),
        ("merges", None),
        ("token_type", None),
        ("token_type", np.ones(7, np.float32)),
        ("token_type", TOKENS),
    ],
)
def test_other_tokenizers_are_not_made(key, value):
    assert made(**{f"tokenizer.ggml.{key}": value}) == {}
