"""Bases that are folders of safetensors files."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from bonsai_lora.checkpoints.base import Base, Description
from bonsai_lora.checkpoints.file import BaseFile, StoredTensor
from bonsai_lora.checkpoints.folder import INDEX_FILE, MOST_JSON_BYTES, FolderFiles, weight_map_of
from bonsai_lora.errors import BonsaiLoraError, InvalidBaseError
from bonsai_lora.formats import safetensors

_HAS_NO_LM_HEAD = re.compile("Classification|QuestionAnswering|MultipleChoice")
"""In the names of classes with a different head, although their configurations tie embeddings."""


@dataclass(frozen=True, eq=False)
class SafetensorsBase(Base):
    """A base whose tensors are in safetensors files."""

    headers: Mapping[str, safetensors.Header]
    weight_map: Mapping[str, str]
    """Tensor name -> file name."""

    format = "safetensors"

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of all tensors."""
        return self.weight_map.keys()

    def info(self, name: str) -> Description:
        """Return the dtype and shape of a tensor; raises KeyError if it does not exist."""
        info = self.headers[self.weight_map[name]].tensors[name]
        return Description(info.dtype, info.shape)

    def tensor(self, name: str) -> StoredTensor:
        """Return a tensor, not read yet; raises KeyError if it does not exist.

        Raises InvalidRequestError for a dtype outside FLOAT_DTYPES.
        """
        file = self.weight_map[name]
        header = self.headers[file]
        info = header.tensors[name]
        dtype = safetensors.dtype_of(header, name)
        return StoredTensor(self.files[file], header.data_start + info.start, dtype, info.shape)

    @cached_property
    def architecture(self) -> str:
        """`model_type` of config.json; empty if unknown."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else ""

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head shares the embedding, by config.json or because there is no head."""
        if _HAS_NO_LM_HEAD.search(str(self.config.get("architectures"))):
            return False
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.weight_map))

    @cached_property
    def dtypes(self) -> Mapping[str, int]:
        """Number of parameters by dtype."""
        counts: Counter[str] = Counter()
        for header in self.headers.values():
            for info in header.tensors.values():
                counts[info.dtype] += math.prod(info.shape)
        return counts

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(self.dtypes.values())


def open_safetensors(
    name: str, found: FolderFiles, files: Mapping[str, BaseFile], digest: "hashlib._Hash"
) -> SafetensorsBase:
    """Return the base of a folder whose files are open; raises InvalidBaseError.

    `digest` covers samples of the files; the headers are added to it.
    """
    headers: dict[str, safetensors.Header] = {}
    weight_map: dict[str, str] = {}
    for file in sorted(found.weights):
        header = headers[file] = _header_of(name, file, files[file])
        digest.update(files[file].read(0, header.data_start))
        for tensor in header.tensors:
            if weight_map.setdefault(tensor, file) != file:
                raise InvalidBaseError(
                    f"base {name!r} has tensor {tensor!r} in two files, {weight_map[tensor]} and "
                    f"{file}; keep model.safetensors or add an index",
                    base=name,
                )
    _check_index(name, files, weight_map)
    return SafetensorsBase(name, files, digest.hexdigest(), found.ignored, headers, weight_map)


def _content(file: BaseFile) -> bytes:
    if file.size_bytes > MOST_JSON_BYTES:
        raise ValueError(f"the file has more than {MOST_JSON_BYTES} bytes")
    return bytes(file.read(0, file.size_bytes))


def _header_of(name: str, file: str, opened: BaseFile) -> safetensors.Header:
    size = opened.size_bytes
    try:
        length = safetensors.header_length(opened.read(0, min(8, size)))
        header = safetensors.decode_header(opened.read(0, min(8 + length, size)))
        safetensors.check_total(header, size)
    except BonsaiLoraError as error:
        raise InvalidBaseError(f"{file} of base {name!r}: {error.detail}", base=name) from None
    return header


def _check_index(name: str, files: Mapping[str, BaseFile], weight_map: Mapping[str, str]) -> None:
    if INDEX_FILE not in files:
        return
    try:
        listed = weight_map_of(_content(files[INDEX_FILE]))
        wrong = [tensor for tensor, file in listed.items() if weight_map.get(tensor) != file]
    except ValueError:
        raise InvalidBaseError(
            f"{INDEX_FILE} of base {name!r} is not a valid index; download it again or remove it",
            base=name,
        ) from None
    if wrong:
        raise InvalidBaseError(
            f"{INDEX_FILE} of base {name!r} lists tensors that are not in the named files: "
            f"{', '.join(wrong[:8])}; download the missing files or remove the index",
            base=name,
        )
