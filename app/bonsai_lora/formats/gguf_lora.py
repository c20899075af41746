"""GGUF LoRA files, read: adapters as llama.cpp applies them, under the names of PEFT.

Format and meaning: src/llama-adapter.cpp of llama.cpp (release b11434). The tensors NAME.lora_a
(r, d_in) and NAME.lora_b (d_out, r) change the tensor NAME of the base by scale * B @ A. The scale
is alpha / r, with the rank of each tensor, or 1 if adapter.lora.alpha is 0 or missing. The factors
of the embedding are (vocabulary, r) and (width, r); those of a stack of experts have one matrix per
expert.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bonsai_lora.core.cast import Array
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError, counted
from bonsai_lora.formats.dequantize import PLAIN_TYPES, read_rows
from bonsai_lora.formats.fused import MAX_EXPERTS
from bonsai_lora.formats.gguf import Header
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_names import (
    ARCHITECTURES,
    GGUF_EMBEDDING,
    Change,
    Heads,
    Order,
    column_order,
    is_stack,
    row_order,
    to_hugging_face,
)
from bonsai_lora.formats.gguf_values import ReadAt, ValueType, read_exactly
from bonsai_lora.formats.made_config import made_config
from bonsai_lora.formats.peft_keys import tensor_name

ALPHA_KEY = "adapter.lora.alpha"
BASE_NAME_KEY = "general.base_model.0.name"
FOLDED_KEY = "bonsai_lora.folded"
"""True if the factors are for folded weights (see hadamard); only this project writes it."""

_HALVES = (".lora_a", ".lora_b")
_NOT_MULTIPLIED = ("_norm.weight", "ssm_conv1d.weight")


@dataclass(frozen=True, slots=True)
class DecodedLora:
    """A GGUF LoRA as a PEFT adapter."""

    config: dict[str, Any]
    tensors: dict[str, Array]
    ignored_keys: list[str]
    """Norms, which llama.cpp ignores too."""


def check_is_lora(header: Header) -> None:
    """Raise UnsupportedAdapterError, with what the file is, unless it is a GGUF LoRA."""
    kind = header.get("general.type")
    if kind != "adapter":
        what = "a model" if kind in (None, "model") else f"of type {str(kind)[:100]!r}"
        raise UnsupportedAdapterError(
            f"this GGUF file is {what}, not an adapter; send the LoRA file, as llama.cpp's "
            "convert_lora_to_gguf.py writes it",
            field="general.type",
        )
    form = header.get("adapter.type")
    if form != "lora":
        raise UnsupportedAdapterError(
            f"adapter.type is {str(form)[:100]!r}; only lora can be served", field="adapter.type"
        )
    for key, reason in _REFUSED.items():
        if key in header.pairs:
            raise UnsupportedAdapterError(f"the file has the key {key}: {reason}", field=key)


_REFUSED = {
    "adapter.alora.invocation_tokens": "it is an activated LoRA, which acts only after certain "
    "tokens; train a plain LoRA",
    "split.count": "it is part of a split file, which llama.cpp does not read as an adapter; merge "
    "the parts with llama-gguf-split --merge",
    FOLDED_KEY: "it was made for a base with Hadamard-folded weights; export it again without "
    "folded=true",
}


def float32_bytes(header: Header) -> int:
    """Return how many bytes the tensors need as float32."""
    return 4 * sum(math.prod(one.shape) for one in header.tensors.values())


def count_modules(header: Header) -> int:
    """Return how many modules a GGUF LoRA adapts; each expert of a stack is one."""
    factors = [one for name, one in header.tensors.items() if name.endswith(_HALVES[0])]
    return sum(one.shape[0] if len(one.shape) == 3 else 1 for one in factors)


def copied_bytes(header: Header, architecture: str | None = None) -> int:
    """Return how much memory `decode_lora` takes for values that are not views of the file."""
    names = architecture or header.architecture
    return sum(
        4 * math.prod(info.shape)
        for name, info in header.tensors.items()
        if info.type.name not in PLAIN_TYPES or _is_reordered(names, name[: -len(_HALVES[0])])
    )


def _is_reordered(architecture: str, name: str) -> bool:
    found = to_hugging_face(architecture, name)
    return found is not None and found.change is not Change.NONE


def decode_lora(
    header: Header, read: ReadAt, architecture: str | None = None, heads: Heads | None = None
) -> DecodedLora:
    """Return a GGUF LoRA as PEFT's configuration and tensors.

    `architecture` replaces the file's own. `heads` are those of the base, for architectures whose
    rows are ordered by head in GGUF. Raises UnsupportedAdapterError and InvalidAdapterError with
    the reason, UnsupportedGgufError for a tensor type without a decoder.
    """
    check_is_lora(header)
    names = _architecture(header, architecture)
    alpha = _alpha(header)
    pairs, ignored = _pairs(header)
    tensors: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for name, (a_info, b_info) in pairs.items():
        rank = _rank(names, name, a_info, b_info)
        embedding = "embedding_" if name == GGUF_EMBEDDING else ""
        a_matrix, b_matrix = _values(read, a_info), _values(read, b_info)
        for module, a_part, b_part in _modules(names, name, a_matrix, b_matrix, heads):
            tensors[tensor_name(module, f"{embedding}A")] = a_part
            tensors[tensor_name(module, f"{embedding}B")] = b_part
            ranks[module] = rank
    base = header.get(BASE_NAME_KEY)
    alphas = {module: alpha or float(rank) for module, rank in ranks.items()}
    config = made_config(base if isinstance(base, str) else None, ranks, alphas)
    return DecodedLora(config, tensors, ignored)


def _architecture(header: Header, given: str | None) -> str:
    name = given or header.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedAdapterError(
            f"the tensor names of architecture {name[:100]!r} are unknown; if it has the same "
            f"names as one of {', '.join(sorted(ARCHITECTURES))}, give that as ?architecture=",
            field="general.architecture",
            got=name[:100],
            expected=sorted(ARCHITECTURES),
        )
    return name


def _alpha(header: Header) -> float:
    """Return alpha; 0 if missing. llama.cpp aborts for a type other than FLOAT32."""
    value = header.pairs.get(ALPHA_KEY)
    if value is None:
        return 0.0
    if value.type is not ValueType.FLOAT32 or not isinstance(value.content, float):
        raise InvalidAdapterError(
            f"{ALPHA_KEY} is of type {value.type.name}; expected FLOAT32", field=ALPHA_KEY
        )
    if not math.isfinite(value.content):
        raise InvalidAdapterError(
            f"{ALPHA_KEY} is {value.content}; expected a finite number", field=ALPHA_KEY
        )
    return value.content


_Pairs = dict[str, tuple[TensorInfo, TensorInfo]]


def _pairs(header: Header) -> tuple[_Pairs, list[str]]:
    """Return the two factors by the base tensor's name, and the names to ignore."""
    halves: tuple[dict[str, TensorInfo], dict[str, TensorInfo]] = ({}, {})
    ignored = []
    for name, info in header.tensors.items():
        if name.endswith(_HALVES):
            halves[name.endswith(_HALVES[1])][name[: -len(_HALVES[0])]] = info
        elif name.endswith("_norm.weight"):
            ignored.append(name)
        else:
            raise UnsupportedAdapterError(
                f"tensor {name!r} is neither NAME.lora_a nor NAME.lora_b, so that llama.cpp "
                "refuses the file; remove it",
                key=name,
            )
    lonely = sorted(halves[0].keys() ^ halves[1].keys())
    if lonely:
        missing = _HALVES[lonely[0] in halves[0]]
        raise InvalidAdapterError(
            f"{lonely[0]}{missing} is missing ({counted(len(lonely), 'pair')} "
            "without one half in all); convert the adapter again",
            keys=lonely[:64],
        )
    if not halves[0]:
        raise InvalidAdapterError("the file has no lora_a and lora_b; convert the adapter again")
    return {name: (info, halves[1][name]) for name, info in halves[0].items()}, ignored


def _rank(architecture: str, name: str, a_info: TensorInfo, b_info: TensorInfo) -> int:
    """Return r; raises InvalidAdapterError unless the shapes of both factors fit."""
    a_shape, b_shape = a_info.shape, b_info.shape
    stacked = is_stack(architecture, name)
    if not stacked:
        _module(architecture, name)
    if name == GGUF_EMBEDDING:
        fits = len(a_shape) == len(b_shape) == 2 and a_shape[1] == b_shape[1]
        expected = "(vocabulary, r) and (width, r)"
    else:
        fits = (
            len(a_shape) == len(b_shape) == 2 + stacked
            and a_shape[-2] == b_shape[-1]
            and a_shape[:-2] == b_shape[:-2]
            and (not stacked or a_shape[0] <= MAX_EXPERTS)
        )
        of_each = f" for each of up to {MAX_EXPERTS} experts" if stacked else ""
        expected = f"(r, d_in) and (d_out, r){of_each}"
    if not fits or 0 in a_shape + b_shape:
        raise InvalidAdapterError(
            f"lora_a and lora_b of {name!r} have shapes {list(a_shape)} and {list(b_shape)}; "
            f"expected {expected}",
            key=name,
            got=[list(a_shape), list(b_shape)],
        )
    return b_shape[-1]


def _values(read: ReadAt, info: TensorInfo) -> Array:
    """Return a tensor: a view of the file if its type is kept, else float32."""
    dtype = PLAIN_TYPES.get(info.type.name)
    if dtype is None:
        return read_rows(read, info, 0, math.prod(info.shape[:-1])).reshape(info.shape)
    raw = read_exactly(read, info.start, info.stop - info.start, "a tensor")
    return np.frombuffer(raw, dtype).reshape(info.shape)


def _modules(
    architecture: str, name: str, a_matrix: Array, b_matrix: Array, heads: Heads | None
) -> Iterator[tuple[str, Array, Array]]:
    """Yield the modules that a tensor of the base is, with A and B as in PEFT."""
    if a_matrix.ndim == 3:
        for expert in range(len(a_matrix)):
            module, _ = _module(architecture, name, expert)
            yield module, a_matrix[expert], b_matrix[expert]
        return
    module, change = _module(architecture, name)
    if name == GGUF_EMBEDDING:
        yield module, a_matrix.T, b_matrix
        return
    rows, columns = orders(name, change, heads, len(b_matrix), a_matrix.shape[1])
    yield (
        module,
        a_matrix if columns is None else a_matrix[:, np.argsort(columns)],
        b_matrix if rows is None else b_matrix[np.argsort(rows)],
    )


def _module(architecture: str, name: str, expert: int | None = None) -> tuple[str, Change]:
    found = to_hugging_face(architecture, name, expert)
    if not is_multiplied(name):
        raise UnsupportedAdapterError(
            f"llama.cpp applies no adapter to {name!r}, which multiplies no input; remove it",
            key=name,
        )
    if found is None or not found.name.endswith(".weight"):
        raise UnsupportedAdapterError(
            f"the base tensor {name!r} is unknown for architecture {architecture!r}; if the names "
            f"are those of a different one ({', '.join(sorted(ARCHITECTURES))}), give it as "
            "?architecture=",
            key=name,
            architecture=architecture,
        )
    return found.name.removesuffix(".weight"), found.change


def is_multiplied(name: str) -> bool:
    """Return whether a tensor of a base may be a matrix; llama.cpp adapts no norm or convolution.

    It loads such factors without an error, and never applies them.
    """
    return not name.endswith(_NOT_MULTIPLIED)


def orders(
    name: str, change: Change, heads: Heads | None, rows: int, columns: int
) -> tuple[Order | None, Order | None]:
    """Return the order of B's rows and of A's columns in GGUF (see gguf_names.row_order).

    Raises UnsupportedAdapterError if they depend on unknown head counts.
    """
    if change is Change.NONE:
        return None, None
    if heads is None:
        raise UnsupportedAdapterError(
            f"{name!r} is ordered by attention head in GGUF, but the head counts are unknown, "
            "which an adapter does not contain; put the base's folder, with its config.json, into "
            "the folder that --bases names, and give its name as base_model_name",
            key=name,
        )
    return row_order(change, heads, rows), column_order(change, heads, columns)
