"""Tokenizers made from GGUF files, in transformers and against llama.cpp."""

import ctypes
import json

import gguf_models
import numpy as np
import pytest

from bonsai_lora.formats import gguf, gguf_tokenizer

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

CORPUS = ["The quick brown fox jumps over the lazy dog's back, doesn't it?",
          "Füchse springen über 1234 Hunde.\n\n  Zwei  Leerzeichen\tund ein Tabulator.",
          "日本語のテキスト と 한국어", "def f(x):\r\n    return x ** 2  # squared", "हिन्दी में एक वाक्य, नमस्ते दुनिया"] * 4  # fmt: skip
TEXTS = [*CORPUS[:5], "<|im_start|>user\nthe dog's 2026 fox<|im_end|>\n", "e\u0301 is é", "", " "]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def keys():
    """A vocabulary that the package tokenizers trained, as the keys of a file."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Tokens that cross words: only the pre-tokenizer keeps them from being used.
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    model = json.loads(made.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *SPECIAL, "[PAD]"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    end = np.uint32(len(tokens) - 2)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * (len(tokens) - 4) + [3, 3, 3, 5], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def tokens_of_llamacpp(path, text):
    import llamacpp

    llama = llamacpp.library()
    llama.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    options = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(str(path).encode(), options)
    assert model
    out = (ctypes.c_int32 * 1000)()
    raw = text.encode()
    vocabulary = llama.llama_model_get_vocab(model)
    count = llama.llama_tokenize(vocabulary, raw, len(raw), out, 1000, False, True)
    llama.llama_model_free(model)
    return list(out[:count])


@pytest.mark.parametrize("pre", ["qwen2", "qwen35"])
def test_transformers_and_llamacpp_find_the_same_tokens(keys, tmp_path, rng, monkeypatch, pre):
    keys = {**keys, "tokenizer.ggml.pre": pre}
    pytest.importorskip("xllamacpp")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(gguf_models, "VOCABULARY", len(keys["tokenizer.ggml.tokens"]))
    raw, _ = gguf_models.model("Q8_0", rng, **keys)
    path = tmp_path / "b.gguf"
    path.write_bytes(raw)
    read = gguf.reader_of(raw)
    files = gguf_tokenizer.tokenizer_files(gguf.read_header(read, len(raw)), read)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = loaded.encode(text, add_special_tokens=False)
        if "e\u0301" not in text:  # llama.cpp does not normalize
            assert ids == tokens_of_llamacpp(path, text), text
        assert loaded.decode(ids, skip_special_tokens=False) == text.replace("e\u0301", "é")
    assert loaded.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "fox"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "fox"
