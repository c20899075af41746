"""The file of one set: safetensors with PEFT key names, everything else in its metadata.

The file is itself the `adapter_model.safetensors` of the set's PEFT folder. Its record comes
first in the header, so that a listing reads a few kilobytes of each file and no tensor entry.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Array
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import HeaderTooLargeError, MalformedSafetensorsError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.mapped import map_file
from bonsai_lora.formats.peft import set_tensors
from bonsai_lora.formats.peft_keys import group_keys
from bonsai_lora.storage.residency import resident_bytes
from bonsai_lora.storage.upload import Arrived

_METADATA_START = b'{"__metadata__":'
_RECORD_KEY = "bonsai_lora"
_MODULES_KEY = "bonsai_lora_modules"
_CONFIG_KEY = "adapter_config"
_PEEK_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class SetRecord:
    """What is known of a set without its tensors."""

    name: str
    uid: str
    """Random at creation; with `version` it names one content for ever."""
    version: int
    """1 at creation, one more with each change."""
    created_at: str
    """RFC 3339, UTC."""
    updated_at: str
    origin: str
    """initialized, peft, mlx, gguf or mixed."""
    base_model_name: str
    config: LoraConfig
    adapter_count: int
    total_trainable_params: int
    data_bytes: int
    """Length of the tensors in the file."""

    @property
    def total_memory_bytes(self) -> int:
        """Size of all matrices as float32, in bytes."""
        return 4 * self.total_trainable_params

    @property
    def etag(self) -> str:
        """Strong entity tag, stable across restarts and processes."""
        return f'"{self.uid}-{self.version}"'


@dataclass(frozen=True, eq=False, slots=True)
class StoredSet:
    """One version of a set, opened: its arrays are views of the mapped file."""

    record: SetRecord
    lora_set: BonsaiLoraSet
    adapter_config: Mapping[str, Any] | None
    """The adapter_config.json that came with an upload, while the set is still that upload."""
    file: memoryview
    """The whole file, mapped; stays readable when the set is replaced or deleted."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What users of this version remember of it; it goes when the version does."""

    def resident_bytes(self) -> int:
        """Return how much of the file is in memory."""
        return resident_bytes(self.file)


def write_set_file(file: BinaryIO, stored: "NewSet") -> None:
    """Write the file of a set; zeros that were never written by anyone become holes."""
    header = stored.header()
    file.write(header)
    file.truncate(len(header) + stored.record.data_bytes)
    for array in set_tensors(stored.lora_set).values():
        if _is_zero_constant(array):
            file.seek(array.nbytes, os.SEEK_CUR)
        else:
            file.write(safetensors.as_bytes(array))


def write_header(stored: "NewSet", arrived: Arrived, names: Mapping[str, str]) -> bool:
    """Make an arrived upload the file of a set by its header; return False where it has no room."""
    infos = arrived.header.tensors
    layout = {names[key]: (info.dtype, info.shape) for key, info in infos.items()}
    try:
        header = stored.header(layout, arrived.header.data_start)
    except ValueError:
        return False
    arrived.write_header(header)
    return True


@dataclass(frozen=True, eq=False, slots=True)
class NewSet:
    """A set that is to be written."""

    record: SetRecord
    lora_set: BonsaiLoraSet
    adapter_config: Mapping[str, Any] | None

    def header(self, layout: safetensors.Layout | None = None, length: int | None = None) -> bytes:
        """Return the file's header, for tensors in the order of `layout` (default: the set's).

        Raises HeaderTooLargeError where it could not be read again, ValueError where it does not
        fit into `length` bytes.
        """
        if layout is None:
            layout = safetensors.layout_of(set_tensors(self.lora_set))
        header = safetensors.encode_header(layout, self._metadata(), length=length)
        if len(header) > safetensors.MAX_HEADER_BYTES:
            raise HeaderTooLargeError(
                f"the set has so many or so long names that its header takes {len(header)} bytes; "
                f"at most {safetensors.MAX_HEADER_BYTES} can be read again",
                got_bytes=len(header),
                limit_bytes=safetensors.MAX_HEADER_BYTES,
            )
        return header

    def _metadata(self) -> dict[str, str]:
        record = self.record
        modules = {
            name: [
                one.config.alpha,
                one.scaling,
                one.layer,
                *([one.experts] if one.experts else []),
            ]
            for name, one in self.lora_set.registry.adapters.items()
        }
        metadata = {
            _RECORD_KEY: json.dumps({**asdict(record), "config": record.config.to_dict()}),
            "format": "pt",
            _MODULES_KEY: json.dumps(modules),
        }
        if self.adapter_config is not None:
            metadata[_CONFIG_KEY] = json.dumps(self.adapter_config)
        return metadata


def _is_zero_constant(array: Array) -> bool:
    return array.size > 0 and not any(array.strides) and not array.flat[0]


def read_record(path: Path) -> SetRecord:
    """Return the record of the file without reading its tensor entries.

    Raises MalformedSafetensorsError where it is not a whole file of ours.
    """
    with path.open("rb") as file:
        prefix = file.read(_PEEK_BYTES)
        length = safetensors.header_length(prefix)
        while True:
            try:
                text = prefix[8 : 8 + length].decode("utf-8", "ignore")
                metadata, _ = json.JSONDecoder().raw_decode(text, len(_METADATA_START))
                break
            except ValueError:
                more = file.read(len(prefix))
                if not more or len(prefix) >= 8 + length:
                    raise MalformedSafetensorsError(f"{path.name} is no set file") from None
                prefix += more
        record = _decode_record(path, metadata)
        _check_size(path, 8 + length + record.data_bytes, os.fstat(file.fileno()).st_size)
        return record


def open_set_file(path: Path) -> StoredSet:
    """Return the set in that file, mapped; raises MalformedSafetensorsError as `read_record`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        mapped = map_file(file)
    header = safetensors.decode_header(mapped)
    record = _decode_record(path, header.metadata)
    _check_size(path, header.total_bytes, size)
    config = header.metadata.get(_CONFIG_KEY)
    return StoredSet(
        record,
        _open_set(mapped, header, record),
        None if config is None else json.loads(config),
        mapped,
    )


def _open_set(mapped: memoryview, header: safetensors.Header, record: SetRecord) -> BonsaiLoraSet:
    def tensor(key: str | None) -> Array | None:
        return None if key is None else safetensors.view(mapped, header, key)

    modules, others = group_keys(header.tensors)
    adapters = {}
    for module, (alpha, scaling, layer, *more) in json.loads(header.metadata[_MODULES_KEY]).items():
        experts = more[0] if more else None
        parts = modules[module]
        embedding = "embedding_" if layer == "embedding" else ""
        a_matrix = safetensors.view(mapped, header, parts[f"{embedding}A"])
        b_matrix = safetensors.view(mapped, header, parts[f"{embedding}B"])
        own = replace(record.config, rank=len(a_matrix) // (experts or 1), alpha=alpha)
        vectors = tensor(parts.get("bias")), tensor(parts.get("magnitude"))
        adapters[module] = LoraAdapter(own, a_matrix, b_matrix, scaling, *vectors, layer, experts)
    return BonsaiLoraSet(
        LoraRegistry(record.config).add_all(adapters),
        record.base_model_name,
        record.name,
        {name: safetensors.view(mapped, header, key) for name, key in others.items()},
    )


def _decode_record(path: Path, metadata: Any) -> SetRecord:
    try:
        fields = json.loads(metadata[_RECORD_KEY])
        fields["config"] = LoraConfig.from_dict(fields["config"])
        record = SetRecord(**fields)
    except (KeyError, TypeError, ValueError):
        raise MalformedSafetensorsError(f"{path.name} has no record of a set") from None
    if path.name != f"{record.name}.safetensors":
        raise MalformedSafetensorsError(f"{path.name} is a copy of set {record.name!r}")
    return record


def _check_size(path: Path, expected: int, got: int) -> None:
    if expected != got:
        raise MalformedSafetensorsError(
            f"{path.name} has {got} bytes, but its header describes {expected}: it was cut off"
        )
