"""Bases that are GGUF files, dequantized when they are read."""

import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bonsai_lora.checkpoints.base import Base, Description
from bonsai_lora.checkpoints.file import BaseFile
from bonsai_lora.checkpoints.gguf_split import read_parts
from bonsai_lora.checkpoints.gguf_tensor import Conversion, GgufTensor
from bonsai_lora.errors import (
    BaseChangedError,
    BonsaiLoraError,
    InvalidBaseError,
    UnsupportedGgufError,
)
from bonsai_lora.formats import gguf, gguf_config, gguf_names, gguf_tokenizer
from bonsai_lora.formats.dequantize import can_dequantize
from bonsai_lora.formats.gguf_names import (
    ARCHITECTURES,
    GGUF_EMBEDDING,
    GGUF_HEAD,
    HEAD,
    Change,
    Heads,
)
from bonsai_lora.formats.hadamard import Folding, read_folding

_MOST_NAMES = 1 << 17
"""Tensors of a checkpoint, each expert counted. DeepSeek V3 has 46,000."""
_MOST_ALIGNMENT = 1 << 16
"""Of a merged file, that many zeros may be made at a time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint is in the file."""

    name: str
    """The file's tensor."""
    change: Change
    expert: int | None


@dataclass(frozen=True, eq=False)
class GgufBase(Base):
    """A base whose tensors are in one GGUF file, or in the parts of one."""

    file: BaseFile
    """The only file, or the first part, which has the keys."""
    header: gguf.Header
    holders: Mapping[str, BaseFile]
    """Tensor of the header -> the file that has it."""

    format = "gguf"

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.header.architecture

    @property
    def model_type(self) -> str:
        """`model_type` of the same model in transformers."""
        return gguf_config.MODEL_TYPES.get(self.architecture, self.architecture)

    @property
    def is_tied(self) -> bool:
        """Whether the file has no head, which then is the embedding."""
        return GGUF_HEAD not in self.header.tensors

    @cached_property
    def can_untie(self) -> bool:  # type: ignore[override]
        """Whether the architecture may have a head of its own, but the file has none."""
        return (
            self.is_tied
            and GGUF_EMBEDDING in self.header.tensors
            and gguf_names.to_gguf(self.architecture, HEAD) is not None
        )

    @property
    def dtypes(self) -> Mapping[str, int]:
        """Number of tensors by type."""
        return Counter(info.type.name for info in self.header.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(info.shape) for info in self.header.tensors.values())

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of all tensors; a tied head is among them.

        Raises UnsupportedGgufError for an architecture whose names are unknown.
        """
        return self.places.keys()

    @cached_property
    def heads(self) -> Heads:
        """The head counts on which the order of rows depends."""
        return Heads.of(self.header)

    @property
    def experts(self) -> int | None:
        """Experts of a layer; None if the file says nothing of any."""
        found = self.header.get(f"{self.architecture}.expert_count")
        return found if isinstance(found, int) and found > 0 else None

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Tensor name -> place in the file. A tied head is at the place of the embedding.

        Raises UnsupportedGgufError for an architecture whose names are unknown.
        """
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedGgufError(
                f"base {self.name!r} has the architecture {self.architecture[:100]!r}, whose "
                f"tensor names are unknown; expected one of {', '.join(sorted(ARCHITECTURES))}",
                got=self.architecture[:100],
            )
        found = {
            theirs: place for name in self.header.tensors for theirs, place in self.places_in(name)
        }
        if self.can_untie:
            found[HEAD] = Place(GGUF_EMBEDDING, Change.NONE, None)
        return found

    def places_in(self, name: str) -> Sequence[tuple[str, Place]]:
        """Return the tensors of a checkpoint that a tensor of the file holds.

        One, or one per expert of a stack; none if the name is unknown.
        """
        shape = self.header.tensors[name].shape
        is_stack = len(shape) == 3 and gguf_names.is_stack(self.architecture, name)
        experts: Sequence[int | None] = range(min(shape[0], _MOST_NAMES)) if is_stack else [None]
        found = []
        for expert in experts:
            theirs = gguf_names.to_hugging_face(self.architecture, name, expert)
            if theirs is not None:
                found.append((theirs.name, Place(name, theirs.change, expert)))
        return found

    def info(self, name: str) -> Description:
        """Return the dtype and shape of a tensor; raises KeyError if it does not exist.

        The dtype is F32, whatever the stored type, or that type if it cannot be dequantized.
        """
        place = self.places[name]
        info = self.header.tensors[place.name]
        return Description(
            "F32" if can_dequantize(info.type) else info.type.name, _shape_of(place, info.shape)
        )

    def tensor(self, name: str) -> GgufTensor:
        """Return a tensor, not read yet; raises KeyError if it does not exist.

        Raises UnsupportedGgufError if its rows cannot be brought into the order of a checkpoint.
        """
        place = self.places[name]
        info = self.header.tensors[place.name]
        shape = _shape_of(place, info.shape)
        folding = self.folding_of(place.name)
        is_grouped = self.folding is not None and self.folding.is_grouped
        found = GgufTensor(
            self.holders[place.name],
            info,
            shape,
            Conversion(place.change, self.heads, has_columns=not is_grouped),
            folding,
            0 if place.expert is None else place.expert * shape[0],
            len(shape) == 2,
        )
        found.check()
        return found

    def stored(self, name: str) -> GgufTensor:
        """Return a tensor of the file by its own name, in its own order, but unfolded."""
        info = self.header.tensors[name]
        rows = math.prod(info.shape[:-1])
        file, shape = self.holders[name], (rows, info.width)
        found = GgufTensor(file, info, shape, Conversion(), self.folding_of(name))
        found.check()
        return found

    def folding_of(self, name: str) -> Folding | None:
        """Return how a tensor of the file is folded; None if it is plain."""
        is_folded = self.folding is not None and name in self.folding.weights
        return self.folding if is_folded else None

    @cached_property
    def tokenizer(self) -> Mapping[str, tuple[int, bytes]]:
        """Tokenizer files made from the header: name -> length, and compressed content.

        Empty if the base has a tokenizer of its own, or none of the kind that is known.
        """
        if "tokenizer.json" in self.files:
            return {}
        made = gguf_tokenizer.tokenizer_files(self.header, self.file.read_at)
        return {name: (len(raw), zlib.compress(raw, 1)) for name, raw in made.items()}


def _shape_of(place: Place, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in a checkpoint of a tensor with the `stored` shape."""
    if place.expert is not None:
        return stored[1:]
    if place.change is Change.CONVOLUTION and len(stored) == 2:
        return stored[0], 1, stored[1]
    return stored


def open_gguf(
    name: str,
    ggufs: Sequence[str],
    files: Mapping[str, BaseFile],
    ignored: Sequence[str],
    digest: "hashlib._Hash",
) -> GgufBase:
    """Return the base whose tensors are in `ggufs`, one file or all parts of a split model.

    `digest` covers samples of the files; the headers are added to it. Raises InvalidBaseError.
    """
    parts = read_parts(name, {file: files[file] for file in ggufs})
    header, opened = parts.header, files[ggufs[0]]
    try:
        folding = read_folding(header, opened.read_at)
        base = GgufBase(name, files, "", ignored, opened, header, parts.holders, folding=folding)
        _check(base)
    except BaseChangedError:
        raise
    except BonsaiLoraError as error:
        raise InvalidBaseError(f"{ggufs[0]} of base {name!r}: {error.detail}", base=name) from None
    for file, size in parts.header_bytes.items():
        for start in range(0, size, 1 << 20):
            digest.update(files[file].read(start, min(start + (1 << 20), size)))
    return replace(base, digest=digest.hexdigest())


def _check(base: GgufBase) -> None:
    """Raise UnsupportedGgufError for a file that is no whole model."""
    kind = base.header.get("general.type")
    if kind not in (None, "model"):
        raise UnsupportedGgufError(
            f"general.type is {str(kind)[:100]!r}, not 'model'; upload adapters as sets"
        )
    if base.header.alignment > _MOST_ALIGNMENT:
        raise UnsupportedGgufError(
            f"general.alignment is {base.header.alignment}, more than {_MOST_ALIGNMENT}"
        )
    if not base.header.tensors:
        raise UnsupportedGgufError("it has no tensors; download it again")
    experts = [
        info.shape[0]
        for name, info in base.header.tensors.items()
        if len(info.shape) == 3 and gguf_names.is_stack(base.architecture, name)
    ]
    if sum(experts) > _MOST_NAMES:
        raise UnsupportedGgufError(
            f"its stacks have {sum(experts)} experts, more than {_MOST_NAMES}", got=sum(experts)
        )
