"""Names of tensors in GGUF files and in Hugging Face checkpoints, and how their values differ.

Names follow gguf-py/gguf/tensor_mapping.py of llama.cpp, changes of values its conversion classes
(release b11434). A stack of experts is one tensor of a GGUF file, but one tensor per expert of a
checkpoint.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache

import numpy as np
import numpy.typing as npt

from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats.gguf import Header

Order = npt.NDArray[np.intp]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"


class Change(Enum):
    """What conversion to GGUF does to the values of a tensor."""

    NONE = auto()
    Q_ROWS = auto()
    """The halves of each query head become even and odd rows, as llama.cpp rotates neighbors."""
    K_ROWS = auto()
    """The same for key heads."""
    PLUS_ONE = auto()
    """The weights of a norm that scales by 1 + w are stored as 1 + w."""
    V_ROWS = auto()
    """Value heads of linear attention, ordered by key head, become ordered by place within it."""
    V_COLUMNS = auto()
    """The same for columns."""
    QKV_ROWS = auto()
    """The same for the rows after those of queries and keys."""
    CONVOLUTION = auto()
    """The same, and the middle dimension of (channels, 1, width) is removed."""
    DECAY = auto()
    """The same, and values become -exp(x)."""


@dataclass(frozen=True, slots=True)
class Counterpart:
    """A tensor under the other naming."""

    name: str
    change: Change = Change.NONE
    expert: int | None = None
    """The place in a stack, if the checkpoint has one tensor per expert."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts and widths on which changes depend."""

    queries: int = 1
    keys: int = 1
    linear_keys: int = 0
    linear_values: int = 0
    """Heads of linear attention; 0 if unknown, which row_order refuses."""
    linear_key_width: int = 0
    """Rows of one key head of linear attention."""

    @classmethod
    def of(cls, header: Header) -> "Heads":
        """Return the counts of a model's header; 0 for one per layer, which row_order refuses."""

        def number(key: str, default: int) -> int:
            key = f"{header.architecture}.{key}"
            found = header.get(key) if key in header.pairs else default
            return found if type(found) is int else 0  # not True

        queries = number("attention.head_count", 1)
        return cls(
            queries,
            number("attention.head_count_kv", queries),
            number("ssm.group_count", 0),
            number("ssm.time_step_rank", 0),
            number("ssm.state_size", 0),
        )


_Row = tuple[str, str, Change]

_LAYER = "model.layers.{}."
_BLOCK = "blk.{}."
_STACKED = "{expert}"

_NO = Change.NONE
_TOP = (
    (EMBEDDING, GGUF_EMBEDDING, _NO),
    ("model.norm.weight", "output_norm.weight", _NO),
    (HEAD, GGUF_HEAD, _NO),
)
_ATTENTION = (
    ("self_attn.q_proj", "attn_q", _NO),
    ("self_attn.k_proj", "attn_k", _NO),
    ("self_attn.v_proj", "attn_v", _NO),
    ("self_attn.o_proj", "attn_output", _NO),
    ("input_layernorm", "attn_norm", _NO),
)
_ROTATED = (
    ("self_attn.q_proj", "attn_q", Change.Q_ROWS),
    ("self_attn.k_proj", "attn_k", Change.K_ROWS),
    *_ATTENTION[2:],
)
_FFN_NORM = (("post_attention_layernorm", "ffn_norm", _NO),)
_MLP = tuple((f"mlp.{one}_proj", f"ffn_{one}", _NO) for one in ("gate", "up", "down"))
_QK_NORMS = (
    ("self_attn.q_norm", "attn_q_norm", _NO),
    ("self_attn.k_norm", "attn_k_norm", _NO),
)
_EXPERTS = (
    ("mlp.gate", "ffn_gate_inp", _NO),
    *(
        (f"mlp.experts.{_STACKED}.{one}_proj", f"ffn_{one}_exps", _NO)
        for one in ("gate", "up", "down")
    ),
)
_FOUR_NORMS = (
    ("post_attention_layernorm", "post_attention_norm", _NO),
    ("pre_feedforward_layernorm", "ffn_norm", _NO),
    ("post_feedforward_layernorm", "post_ffw_norm", _NO),
)
_LINEAR_ATTENTION = (
    ("linear_attn.in_proj_qkv", "attn_qkv", Change.QKV_ROWS),
    ("linear_attn.in_proj_z", "attn_gate", Change.V_ROWS),
    ("linear_attn.in_proj_a", "ssm_alpha", Change.V_ROWS),
    ("linear_attn.in_proj_b", "ssm_beta", Change.V_ROWS),
    ("linear_attn.out_proj", "ssm_out", Change.V_COLUMNS),
    ("linear_attn.conv1d", "ssm_conv1d", Change.CONVOLUTION),
    ("linear_attn.norm", "ssm_norm", _NO),
    ("post_attention_layernorm", "post_attention_norm", _NO),
)
_PHI3 = (
    ("self_attn.qkv_proj", "attn_qkv", _NO),
    ("self_attn.o_proj", "attn_output", _NO),
    ("input_layernorm", "attn_norm", _NO),
    ("mlp.gate_up_proj", "ffn_up", _NO),
    ("mlp.down_proj", "ffn_down", _NO),
)
_ALWAYS_TIED = frozenset({"gemma", "gemma2"})
_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "qwen35"})
_UNCHANGED_NORM = "ssm_norm"

_MODULES: Mapping[str, tuple[_Row, ...]] = {
    "llama": (*_ROTATED, *_FFN_NORM, *_MLP),
    "qwen2": (*_ATTENTION, *_FFN_NORM, *_MLP),
    "qwen3": (*_ATTENTION, *_QK_NORMS, *_FFN_NORM, *_MLP),
    "qwen3moe": (*_ATTENTION, *_QK_NORMS, *_FFN_NORM, *_EXPERTS),
    "gemma": (*_ATTENTION, *_FFN_NORM, *_MLP),
    "gemma2": (*_ATTENTION, *_FOUR_NORMS, *_MLP),
    "gemma3": (*_ATTENTION, *_QK_NORMS, *_FOUR_NORMS, *_MLP),
    "phi3": (*_PHI3, *_FFN_NORM),
    "qwen35": (*_ATTENTION, *_QK_NORMS, *_LINEAR_ATTENTION, *_MLP),
}
"""Architecture -> modules of a layer: names in a checkpoint and in GGUF, and the change."""
_PARAMETERS: Mapping[str, tuple[_Row, ...]] = {
    "qwen35": (
        ("linear_attn.A_log", "ssm_a", Change.DECAY),
        ("linear_attn.dt_bias", "ssm_dt.bias", Change.V_ROWS),
    ),
}
"""Parameters of a layer whose names do not end in `.weight` or `.bias` in both."""

ARCHITECTURES = frozenset(_MODULES)
"""Values of `general.architecture` whose names are known."""

_PREFIX = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")


def to_gguf(architecture: str, name: str) -> Counterpart | None:
    """Return what a tensor of a checkpoint is in a GGUF file; None if unknown.

    Names of multimodal models, under `language_model.`, are accepted.
    """
    text = _PREFIX.sub("", name)
    if text != name and not text.startswith("lm_head."):
        text = f"model.{text}"
    known = _tables(architecture)[0].get(_template(text))
    if known is None:
        return None
    layer, *experts = [int(one) for one in _NUMBER.findall(text)] or [0]
    found, change = known
    return Counterpart(found.format(layer), change, experts[0] if experts else None)


def to_hugging_face(architecture: str, name: str, expert: int | None = None) -> Counterpart | None:
    """Return what a tensor of a GGUF file, or one `expert` of a stack, is in a checkpoint.

    None if it is unknown, or if `expert` is given and it is not a stack, or the reverse. GGUF files
    have tensors that checkpoints lack, such as rope_freqs.weight.
    """
    layer = next(iter(_NUMBER.findall(name)), "0")
    known = _tables(architecture)[1].get(_template(name))
    if known is None:
        return None
    found, change = known
    if (_STACKED in found) != (expert is not None):
        return None
    return Counterpart(found.format(layer, expert=expert), change, expert)


def is_stack(architecture: str, name: str) -> bool:
    """Return whether a tensor of a GGUF file is a stack of experts, (experts, rows, columns)."""
    known = _tables(architecture)[1].get(_template(name))
    return known is not None and _STACKED in known[0]


def row_order(change: Change, heads: Heads, rows: int) -> Order | None:
    """Return `order` (rows,) such that row i in GGUF is row order[i] of the checkpoint.

    None if all rows stay. It also orders the rows of an adapter's B, and the elements of a bias.
    Raises UnsupportedGgufError if the heads do not divide the rows.
    """
    if change in (Change.Q_ROWS, Change.K_ROWS):
        count = heads.queries if change is Change.Q_ROWS else heads.keys
        _check_divides(2 * count, rows)
        return np.arange(rows).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
    if change in (Change.V_ROWS, Change.DECAY):
        return _value_order(heads, rows)
    if change in (Change.QKV_ROWS, Change.CONVOLUTION):
        first = 2 * heads.linear_keys * heads.linear_key_width
        values = _value_order(heads, rows - first)
        if values is None:
            return None
        _check_divides(heads.linear_key_width, first)
        return np.concatenate([np.arange(first), first + values])
    return None


def column_order(change: Change, heads: Heads, columns: int) -> Order | None:
    """Return the same for columns, which also orders the columns of an adapter's A."""
    return _value_order(heads, columns) if change is Change.V_COLUMNS else None


def _value_order(heads: Heads, size: int) -> Order | None:
    if heads.linear_values == heads.linear_keys > 0:
        return None
    _check_divides(heads.linear_keys, heads.linear_values)
    _check_divides(heads.linear_values, size)
    per_key = heads.linear_values // heads.linear_keys
    grouped = np.arange(size).reshape(heads.linear_keys, per_key, -1)
    return grouped.swapaxes(0, 1).reshape(-1)


def _check_divides(count: int, size: int) -> None:
    if count < 1 or size < 0 or size % count:
        raise UnsupportedGgufError(
            f"{size} values are not divided by {count} parts of heads; use a file whose head "
            "counts fit its tensors"
        )


def _template(name: str) -> str:
    """Return a name with {} for each number."""
    return _NUMBER.sub("{}", name) if "{" not in name else ""


_Table = Mapping[str, tuple[str, Change]]


@cache
def _tables(architecture: str) -> tuple[_Table, _Table]:
    """Return the names of checkpoints -> GGUF and back; {} stands for each number."""
    rows = [*_rows(architecture)] if architecture in _MODULES else []
    forth = {theirs.replace(_STACKED, "{}"): (ours, change) for theirs, ours, change in rows}
    return forth, {ours: (theirs, change) for theirs, ours, change in rows}


def _rows(architecture: str) -> Iterator[_Row]:
    norm = Change.PLUS_ONE if architecture in _PLUS_ONE else Change.NONE
    for theirs, ours, change in _TOP[: 2 if architecture in _ALWAYS_TIED else 3]:
        yield theirs, ours, norm if ours == "output_norm.weight" else change
    for theirs, ours, change in _MODULES[architecture]:
        is_norm = ours.endswith("_norm") and ours != _UNCHANGED_NORM
        for suffix in (".weight", ".bias"):
            yield (
                f"{_LAYER}{theirs}{suffix}",
                f"{_BLOCK}{ours}{suffix}",
                norm if is_norm else change,
            )
    for theirs, ours, change in _PARAMETERS.get(architecture, ()):
        yield f"{_LAYER}{theirs}", f"{_BLOCK}{ours}", change
