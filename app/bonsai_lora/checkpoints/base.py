"""What a base checkpoint offers, whatever its format."""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from bonsai_lora.checkpoints.file import BaseFile
from bonsai_lora.checkpoints.folder import CONFIG_FILE
from bonsai_lora.checkpoints.paths import TensorPaths, prefixes_of
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array, Floats, to_float32
from bonsai_lora.core.merge import Block, blocks, merge_rows
from bonsai_lora.formats.hadamard import Folding

_MOST_CONFIG_BYTES = 1 << 24


class Tensor(Protocol):
    """A tensor of a base, whose values are read block by block."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values that are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in a Hugging Face checkpoint."""

    def as_matrix(self, rows: int) -> "Tensor":
        """Return the same values as a matrix of `rows` rows."""

    def __getitem__(self, block: Block) -> Array:
        """Return a copy of a block of a matrix; raises BaseChangedError."""


@dataclass(frozen=True, slots=True)
class Description:
    """Dtype and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Base(ABC):
    """An opened base: all files are open, all headers checked.

    Tensors have the names, shapes and values that they have in a Hugging Face checkpoint.
    """

    name: str
    files: Mapping[str, BaseFile]
    digest: str
    """Identifies the content: names, sizes, times, headers and samples of all files."""
    ignored: Sequence[str]
    """Files and folders beside them that are not part of the model."""

    folding: Folding | None = field(default=None, kw_only=True)
    """How the stored weights are folded; None if they are plain."""

    format = ""
    """`safetensors` or `gguf`."""
    can_untie = False
    """Whether a merged model may have a head of its own where the base shares the embedding."""

    @property
    @abstractmethod
    def tensor_names(self) -> Collection[str]:
        """Names of all tensors."""

    @abstractmethod
    def info(self, name: str) -> Description:
        """Return the dtype and shape of a tensor; raises KeyError if it does not exist."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor, not read yet; raises KeyError if it does not exist.

        Raises InvalidRequestError or UnsupportedGgufError if it has no values as floats.
        """

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The family of the model, such as `qwen3`; empty if unknown."""

    @property
    def model_type(self) -> str:
        """`model_type` of the model's configuration; empty if unknown."""
        return self.architecture

    @property
    @abstractmethod
    def is_tied(self) -> bool:
        """Whether the head shares the embedding."""

    @property
    @abstractmethod
    def dtypes(self) -> Mapping[str, int]:
        """Number of parameters by dtype, of a GGUF file number of tensors by type."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """Number of parameters."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The object in config.json; empty if there is none, or it is malformed or too large."""
        file = self.files.get(CONFIG_FILE)
        if file is None or file.size_bytes > _MOST_CONFIG_BYTES:
            return {}
        try:
            config = json.loads(bytes(file.read(0, file.size_bytes)))
        except (ValueError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}

    @cached_property
    def paths(self) -> TensorPaths:
        """The tensor names, searchable by the module paths of adapters."""
        return TensorPaths(self.name, self.tensor_names, prefixes_of(self.model_type))


def row_norms(weight: Array | Tensor, adapter: LoraAdapter) -> Floats:
    """Return the norms (d_out,) of the rows of W + scaling * B @ A, summed in float64.

    `weight` is (d_out, d_in), or (d_in, d_out) for embeddings and Conv1D. The norm is the
    denominator of DoRA (Liu et al. 2024, equation 5; peft 0.21, tuners/lora/dora.py).
    """
    squares = np.zeros(adapter.d_out)
    axis = 1 if adapter.layer == "linear" else 0
    for block in blocks(*weight.shape):
        values = to_float32(np.ascontiguousarray(weight[block]))
        merged = np.empty_like(values)
        merge_rows(values, *adapter.stored_factors_of(*block), adapter.scaling, out=merged)
        squares[block[1 - axis]] += np.square(merged, dtype=np.float64).sum(axis)
    return np.sqrt(squares).astype(np.float32)
