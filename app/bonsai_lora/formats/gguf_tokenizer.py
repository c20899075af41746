"""Tokenizer files of transformers, made from the keys of a GGUF file.

Byte-level BPE with Qwen's pre-tokenizers, as Bonsai and Bonsai 2 have them: gguf-py's constants and
src/llama-vocab.cpp of llama.cpp (release b11434), and the format of tokenizers 0.22.
"""

from typing import Any

from bonsai_lora.formats.gguf import Header
from bonsai_lora.formats.gguf_values import ReadAt, ValueType, read_array, read_integers
from bonsai_lora.formats.large_json import dump

_MODEL = "gpt2"
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[LETTERS]+|\p{N}"
    r"| ?[^\sLETTERS\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = {"qwen2": r"\p{L}", "qwen35": r"\p{L}\p{M}"}
"""Pre-tokenizer -> the classes of letters. Qwen3.5 keeps combining marks in words."""
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Values of token_type."""
_MOST_TOKENS = 1 << 20
_MOST_BYTES = 1 << 25
"""Larger vocabularies are not turned into a tokenizer."""


def tokenizer_files(header: Header, read: ReadAt) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json by name.

    Empty for a tokenizer of a different kind, or one that contradicts itself. Raises
    MalformedGgufError if the file has become shorter.
    """
    letters = _LETTERS.get(str(header.get(_key("pre"))))
    if header.get(_key("model")) != _MODEL or letters is None:
        return {}
    if header.get(_key("add_bos_token")) is True:
        return {}
    tokens, merges = _strings(header, read, "tokens"), _strings(header, read, "merges")
    types = _types(header, read)
    if tokens is None or merges is None or types is None or len(types) != len(tokens):
        return {}
    if len({*tokens}) < len(tokens):
        return {}
    files = {
        "tokenizer.json": _tokenizer(tokens, merges, types, letters),
        "tokenizer_config.json": _configuration(header, tokens),
    }
    return {name: dump(one, ensure_ascii=False).encode() for name, one in files.items()}


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _strings(header: Header, read: ReadAt, name: str) -> list[str] | None:
    value = header.pairs.get(_key(name))
    if value is None or value.item is not ValueType.STRING:
        return None
    if value.count > _MOST_TOKENS or value.stop - value.start > _MOST_BYTES:
        return None
    return list(read_array(read, value))


def _types(header: Header, read: ReadAt) -> list[int] | None:
    found = read_integers(read, header.pairs.get(_key("token_type")), _MOST_TOKENS)
    return None if found is None else found.tolist()


def _tokenizer(
    tokens: list[str], merges: list[str], types: list[int], letters: str
) -> dict[str, Any]:
    added = [
        {
            "id": number, "content": tokens[number], "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": kind == _CONTROL,
        }
        for number, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
              "use_regex": False}  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": _PATTERN.replace("LETTERS", letters)},
             "behavior": "Isolated", "invert": False}  # fmt: skip
    vocabulary = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _UNUSED
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": bytes_,
        "decoder": bytes_,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip


def _configuration(header: Header, tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": header.get("tokenizer.chat_template"),
        "model_max_length": header.get(f"{header.architecture}.context_length"),
    }
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = header.get(_key(f"{key}_token_id"))
        if isinstance(number, int) and 0 <= number < len(tokens):
            config[f"{field}_token"] = tokens[number]
    return {field: value for field, value in config.items() if value is not None}
