"""Recognize common mistaken uploads by their first bytes or tensor names."""

import re
from collections.abc import Iterable

from bonsai_lora.errors import (
    MalformedGgufError,
    MalformedMultipartError,
    MalformedSafetensorsError,
    UnsupportedAdapterError,
)

_TWO_FILES = "send adapter_config.json and adapter_model.safetensors"
_SAVE_AGAIN = (
    "save the adapter again with save_pretrained(folder, safe_serialization=True) and send "
    "adapter_model.safetensors"
)
_ONLY_LORA = "only LoRA can be served: train one"
_CONVERT = "convert it to PEFT's names first:"
LFS_POINTER = "a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned"
"""What a base model's file that begins with `version` is, and what to do."""
START_BYTES = 1 << 12
"""How much of a file is looked at."""
_TEXT = re.compile(rb"[\x20-\x7e\x80-\xff]{1,1024}")
_PATH = re.compile(r"\S*[./]\S*|.*\.(?:safetensors|bin|gguf)")

_ZIP = rb"PK\x03\x04"
_NUMPY = "is a NumPy file", "save the tensors as safetensors"
_PICKLE = "is a pickle (.bin), which is never loaded", _SAVE_AGAIN
_COMPRESSED = "is a compressed file", f"unpack it and {_TWO_FILES}"
_PAGE = "is a web page", "download the file itself (…/resolve/main/…, not …/blob/main/…)"


_Formats = tuple[tuple[re.Pattern[bytes], tuple[str, str]], ...]
"""How a file begins -> what it is, and what to do."""


def _compiled(*formats: tuple[bytes, tuple[str, str]]) -> _Formats:
    flags = re.DOTALL | re.IGNORECASE
    return tuple((re.compile(start, flags), texts) for start, texts in formats)


_STARTS = _compiled(
    (rb"GGUF", ("is a GGUF file", "send a GGUF LoRA alone, as the part adapter_gguf")),
    (
        rb"version https://git-lfs",
        (
            "is a Git LFS pointer, not the file itself",
            "run `git lfs pull` and send the downloaded file",
        ),
    ),
    # The first zip entry that torch.save writes.
    (
        _ZIP + rb".{26}[\x20-\x7e]*(?:data\.pkl|\.format_version|byteorder|/version)",
        ("is a PyTorch pickle (.bin), which is never loaded", _SAVE_AGAIN),
    ),
    (_ZIP + rb".{26}[\x20-\x7e]*\.npy", _NUMPY),
    (rb"\x80[\x02-\x05]", _PICKLE),
    (_ZIP, ("is a zip archive", f"unpack it and {_TWO_FILES}")),
    (rb"\x1f\x8b", ("is a gzip archive", f"unpack it and {_TWO_FILES}")),
    (rb".{257}ustar", ("is a tar archive", f"unpack it and {_TWO_FILES}")),
    (rb"7z\xbc\xaf", _COMPRESSED),
    (rb"\x89HDF", ("is an HDF5 file", _TWO_FILES)),
    (rb"\s*<(?:!doctype html|html|\?xml)", _PAGE),
    (rb"\s*\{", ("is JSON", "send adapter_config.json as the part adapter_config")),
)
"""How files begin in place of safetensors that are unsupported_adapter."""
_MALFORMED_STARTS = _compiled(
    (rb"\x93NUMPY", _NUMPY),
    (rb"[}\]]q\x00|\([dl]p\d+\n", _PICKLE),
    (rb"Rar!|\xfd7zXZ|BZh\d|\x28\xb5\x2f\xfd", _COMPRESSED),
    (rb"\s*<error>", _PAGE),
)
"""The same for malformed_safetensors: callers know these by that code."""

_KEYS = (
    (re.compile(r"\.hada_w[12]"), "are those of LoHa", _ONLY_LORA),
    (re.compile(r"\.lokr_w[12]"), "are those of LoKr", _ONLY_LORA),
    (
        re.compile(r"^lycoris_|^lora_(?:unet|te\d?)_.*\.[ab][12]\.weight$"),
        "are those of LyCORIS",
        "only LoRA in PEFT's format can be served: convert it, or train one",
    ),
    (
        re.compile(r"^blk\.\d+\."),
        "are those of a GGUF LoRA",
        "send the GGUF file alone, as the part adapter_gguf",
    ),
    (
        re.compile(r"lora_(?:down|up)\.weight$|^lora_(?:unet|te\d?|transformer)_"),
        "are those of a kohya LoRA (lora_down, lora_up)",
        f"{_CONVERT} lora_down is lora_A, lora_up is lora_B, alpha belongs in adapter_config.json",
    ),
    (
        re.compile(r"(?:_lora\d*|\.lora|lora_linear_layer)\.(?:down|up)\.weight$"),
        "are those of an old diffusers or XLabs LoRA (lora.down, lora.up)",
        f"{_CONVERT} lora.down is lora_A, lora.up is lora_B",
    ),
    (
        re.compile(r"\.lora_[ab]\.weight$"),
        "are those of torchtune (lora_a.weight)",
        "save the adapter in PEFT's format: torchtune's Hugging Face checkpointer does",
    ),
    (
        re.compile(r"\.lora_[ab]$"),
        "are those of MLX (lora_a, lora_b), but the configuration is PEFT's",
        "send the adapter_config.json that mlx_lm saved beside them",
    ),
    (
        re.compile(r"\badapter(?:_layer)?(?:\.\w+)?\.linear_(?:in|out)\.weight$"),
        "are those of NeMo and Megatron Bridge (linear_in, linear_out)",
        "export the adapter in PEFT's format first",
    ),
    (
        re.compile(r"\.(?:nested_)?(?:absmax|quant_map)$|\.SCB$|\.quant_state\."),
        "are those of weights that bitsandbytes quantized",
        "save the adapter alone, with save_pretrained of the PeftModel",
    ),
    (re.compile(r"\.ia3_l(?:$|\.)"), "are those of IA3", _ONLY_LORA),
    (re.compile(r"\.(?:oft_[rR]|boft_[rsRS])"), "are those of OFT", _ONLY_LORA),
    (re.compile(r"\.vera_lambda_"), "are those of VeRA", _ONLY_LORA),
    (re.compile(r"\.lora_E(?:$|\.)"), "are those of AdaLoRA", _ONLY_LORA),
    (re.compile(r"^prompt_embeddings$"), "are those of prompt tuning", _ONLY_LORA),
)
_ANY_KEY = re.compile("|".join(pattern.pattern for pattern, _, _ in _KEYS))
"""Matches the keys of all these formats at once, since large adapters have many keys."""
_OTHER_METHODS = re.compile(
    r"\.(?:adamss|beft|bone|c3a|deft|delora|fourierft|frod|glora|gralora|hira|hra|lily|miss|osf|"
    r"peanut|poly|psoft|pvera|randlora|road|shadow|shira|tinylora|unilora|vblora|waveft|xlora)_"
)
"""Prefixes of peft 0.21 (src/peft/mapping.py) that a file without LoRA tensors may have."""


def check_start(content: bytes | bytearray) -> None:
    """Raise if an upload that should be safetensors starts like a different known format.

    Raises UnsupportedAdapterError or MalformedSafetensorsError naming the format,
    MalformedMultipartError if a path was sent, MalformedSafetensorsError for other lines of text.
    """
    start = bytes(content[:START_BYTES])
    if start[8:9] == b"{":
        return
    part = "adapter_model"
    for error, text in (
        (UnsupportedAdapterError, _format(start, part, _STARTS)),
        (MalformedSafetensorsError, _format(start, part, _MALFORMED_STARTS)),
        (MalformedMultipartError, _path(start, part, "adapter_model.safetensors")),
        (MalformedSafetensorsError, _line(start, part)),
    ):
        if text:
            raise error(text)


def check_gguf_start(content: bytes | bytearray | memoryview) -> None:
    """Raise MalformedGgufError if an upload that should be GGUF starts like something known."""
    start, part = bytes(content[:START_BYTES]), "adapter_gguf"
    if start.startswith(b"GGUF"):
        return
    if start[8:9] == b"{":
        raise MalformedGgufError(
            f"{part} is a safetensors file; send it as the part adapter_model, with adapter_config"
        )
    text = _format(start, part, (*_STARTS, *_MALFORMED_STARTS))
    text = text or _path(start, part, "adapter.gguf") or _line(start, part)
    if text:
        raise MalformedGgufError(text)


def _format(start: bytes, part: str, formats: _Formats) -> str:
    """Return that `part` is one of `formats`; empty if it is none."""
    for pattern, (what, advice) in formats:
        if pattern.match(start):
            return f"{part} {what}; {advice}"
    return ""


def _path(start: bytes, part: str, file: str) -> str:
    """Return that `part` is a path; empty if it is none."""
    text = _text_of(start)
    if not _PATH.fullmatch(text):
        return ""
    advice = f"with curl, put @ before the path: -F {part}=@{file}"
    return f"{part} is the text {text[:200]!r}, not a file; {advice}"


def _line(start: bytes, part: str) -> str:
    """Return that `part` is a line of text; empty if it is none."""
    text = _text_of(start)
    return text and f"{part} is the text {text[:200]!r}, not a file; download it again"


def _text_of(start: bytes) -> str:
    line = start.strip()
    return line.decode("utf-8", "replace") if _TEXT.fullmatch(line) else ""


def check_config_start(content: bytes | bytearray) -> None:
    """Raise MalformedMultipartError if a path was sent instead of adapter_config.json."""
    text = bytes(content[:START_BYTES]).strip()
    if text.endswith(b".json") and not text.startswith((b"{", b"\xef\xbb\xbf")):
        raise MalformedMultipartError(
            f"adapter_config is the text {text[:200].decode('utf-8', 'replace')!r}, not a file; "
            "with curl, put @ before the path: -F adapter_config=@adapter_config.json"
        )


def check_keys(keys: Iterable[str]) -> None:
    """Raise UnsupportedAdapterError if the tensor names are those of a different format."""
    candidates = list(filter(_ANY_KEY.search, keys))
    for pattern, what, advice in _KEYS:
        for key in filter(pattern.search, candidates):
            raise UnsupportedAdapterError(
                f"tensor names such as {key[:200]!r} {what}; {advice}", key=key[:200]
            )


def check_no_other_method(keys: Iterable[str]) -> None:
    """Raise UnsupportedAdapterError if a file without LoRA tensors has those of other methods."""
    for key in filter(_OTHER_METHODS.search, keys):
        raise UnsupportedAdapterError(
            f"tensor names such as {key[:200]!r} are those of a PEFT method other than LoRA; "
            f"{_ONLY_LORA}",
            key=key[:200],
        )
