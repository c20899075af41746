"""The file of a set: safetensors with PEFT key names, and everything else in its metadata.

The file doubles as the `adapter_model.safetensors` of the set's PEFT folder. The record is the
first entry of the header, so that listing sets reads only a few kilobytes of each file.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from bonsai_lora.core.adapter import LayerKind, LoraAdapter
from bonsai_lora.core.cast import Array, all_finite
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import (
    BonsaiLoraError,
    MalformedSafetensorsError,
    NewerFormatError,
    counted,
)
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.large_json import ObjectReader
from bonsai_lora.formats.mapped import map_file
from bonsai_lora.formats.peft import set_tensors
from bonsai_lora.formats.peft_keys import group_keys
from bonsai_lora.formats.text import is_unicode
from bonsai_lora.validation import as_written

RECORD_FORMAT = 1
"""The record format that is written and the newest that can be read; the default if missing.

Increment it when older releases would misread a record. A change that they may ignore is a new key
of the record instead; they keep unknown keys.
"""

_METADATA_START = b'{"__metadata__":'
RECORD_KEY = "bonsai_lora"
MODULES_KEY = "bonsai_lora_modules"
CONFIG_KEY = "adapter_config"
_DIGEST_KEY = "digest"
_SOURCE_KEY = "source"
_PEEK_BYTES = 1 << 14
_MOST_FLOAT32 = float(np.finfo(np.float32).max)
_INTEGER_END = 1 << 53
"""Integers below it are the same in every reader of JSON."""
_RECORD_TYPES: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "uid": (str,),
    "version": (int,),
    "created_at": (str,),
    "updated_at": (str,),
    "origin": (str,),
    "base_model_name": (str,),
    "config": (dict,),
    "adapter_count": (int,),
    "total_trainable_params": (int,),
    "data_bytes": (int,),
}
"""Fields of a record and their types in JSON."""
_PATTERNS = {
    "uid": re.compile(r"[A-Za-z0-9._-]{1,64}"),  # stands in ETags
    "origin": re.compile("initialized|peft|gguf|mlx|mixed|combined|extracted"),
}
_CONFIG_TYPES: Mapping[str, tuple[type, ...]] = {
    "rank": (int,),
    "alpha": (int, float),
    "dropout": (int, float),
    "target_modules": (list,),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where one version of a set was taken from."""

    reference: str
    """Such as `folder:my-set`."""
    sha256: str
    """Digest of the files that were read, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class SetRecord:
    """The metadata of a set."""

    name: str
    uid: str
    """Random, chosen at creation; with `version` it identifies the set's content uniquely."""
    version: int
    """1 at creation, incremented by each change."""
    created_at: str
    """RFC 3339, UTC."""
    updated_at: str
    origin: str
    """initialized, peft, mlx, gguf, mixed, combined or extracted."""
    base_model_name: str
    config: LoraConfig
    adapter_count: int
    total_trainable_params: int
    data_bytes: int
    """Length of the tensor data in the file."""
    digest: str | None = None
    """SHA-256 of the file's bytes after its header, in hexadecimal; earlier releases wrote none."""
    source: Source | None = None
    """Where this version came from; None if somebody sent it."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Keys that a later release wrote in this format; they are preserved by changes."""

    @property
    def rank(self) -> int:
        """Rank of the set's configuration; patterns may give modules others."""
        return self.config.rank

    @property
    def total_memory_bytes(self) -> int:
        """Size of all matrices as float32, in bytes."""
        return 4 * self.total_trainable_params

    @property
    def etag(self) -> str:
        """Strong ETag, stable across restarts and processes."""
        return f'"{self.uid}-{self.version}"'


@dataclass(frozen=True, eq=False, slots=True)
class StoredSet:
    """An open version of a set; its arrays are views of the memory-mapped file."""

    record: SetRecord
    lora_set: BonsaiLoraSet
    adapter_config: Mapping[str, Any] | None
    """The uploaded adapter_config.json, until the set is changed."""
    file: memoryview
    """The whole file, memory-mapped; remains readable after the set is replaced or deleted."""


def read_record(path: Path) -> SetRecord:
    """Return the record of the file without reading its tensor entries.

    Raises MalformedSafetensorsError if it is not a complete set file, NewerFormatError if a newer
    release wrote it.
    """
    with path.open("rb") as file:
        return record_of(path, file)


def open_set_file(path: Path) -> StoredSet:
    """Return the set in the file, memory-mapped; raises the errors of `read_record`."""
    with path.open("rb") as file:
        # First, because nothing else in a file of a newer release need make sense here.
        record = record_of(path, file)
        mapped = map_file(file)
    header = safetensors.decode_header(mapped)
    _check_size(path, header.total_bytes, len(mapped))
    text = header.metadata.get(CONFIG_KEY)
    config = None if text is None else json.loads(text)
    if not isinstance(config, dict | None):
        raise MalformedSafetensorsError(f"{path.name} has an {CONFIG_KEY} that is not an object")
    stored = StoredSet(record, _open_set(mapped, header, record), config, mapped)
    if record.digest is None:  # perhaps not written by this program, which checks them first
        _check_values(stored.lora_set)
    return stored


def record_of(path: Path, file: BinaryIO) -> SetRecord:
    """Return the record of the open file at `path`; raises the errors of `read_record`."""
    prefix = file.read(_PEEK_BYTES)
    length = safetensors.header_length(prefix)
    while True:
        try:
            text = prefix[8 : 8 + length].decode()
            metadata, _ = json.JSONDecoder().raw_decode(text, len(_METADATA_START))
            break
        except ValueError:  # the text ends in the middle
            more = file.read(len(prefix))
            if not more or len(prefix) >= 8 + length:
                raise MalformedSafetensorsError(f"{path.name} is not a set file") from None
            prefix += more
    record = _decode_record(path, metadata)
    _check_size(path, 8 + length + record.data_bytes, os.fstat(file.fileno()).st_size)
    return record


def record_from_text(name: str, text: str) -> SetRecord:
    """Return the record of set `name` from JSON; raises the errors of `read_record`."""
    return _decode_record(Path(f"{name}.safetensors"), {RECORD_KEY: text})


def _open_set(mapped: memoryview, header: safetensors.Header, record: SetRecord) -> BonsaiLoraSet:
    def tensor(key: str | None) -> Array | None:
        return None if key is None else safetensors.view(mapped, header, key)

    modules, others = group_keys(header.tensors)
    adapters = {}
    reader = ObjectReader(header.metadata[MODULES_KEY])
    for module in reader.names():
        alpha, scaling, layer, *more = reader.value()
        experts = more[0] if more else None
        is_valid = _is_finite(alpha) and _is_finite(scaling) and layer in get_args(LayerKind)
        if not is_valid or not (experts is None or (type(experts) is int and experts > 0)):
            raise MalformedSafetensorsError(
                f"module {module!r} has {as_written([alpha, scaling, layer, *more])}; expected "
                "alpha, scaling, the kind of layer and a number of experts, if it has any"
            )
        parts = modules[module]
        embedding = "embedding_" if layer == "embedding" else ""
        a_matrix = safetensors.view(mapped, header, parts[f"{embedding}A"])
        b_matrix = safetensors.view(mapped, header, parts[f"{embedding}B"])
        vectors = tensor(parts.get("bias")), tensor(parts.get("magnitude"))
        rank, rest = divmod(len(a_matrix), experts or 1)
        if rest:
            raise MalformedSafetensorsError(
                f"module {module!r} has {counted(experts or 1, 'expert')}, but "
                f"{counted(len(a_matrix), 'row')} in A"
            )
        own = replace(record.config, rank=rank, alpha=alpha)
        adapters[module] = LoraAdapter(own, a_matrix, b_matrix, scaling, *vectors, layer, experts)
    return BonsaiLoraSet(
        LoraRegistry(record.config).add_all(adapters),
        record.base_model_name,
        record.name,
        {name: safetensors.view(mapped, header, key) for name, key in others.items()},
    )


def _check_values(lora_set: BonsaiLoraSet) -> None:
    """Raise MalformedSafetensorsError for what an upload may not have: float64, NaN, infinity."""
    for name, array in set_tensors(lora_set).items():
        if array.dtype == np.float64:
            raise MalformedSafetensorsError(f"{name} is F64; expected F32, F16 or BF16")
        if not all_finite(array):
            raise MalformedSafetensorsError(f"{name} has NaN or infinity; expected finite numbers")


def record_to_text(record: SetRecord) -> str:
    """Return a record as JSON, as it stands in the file."""
    known = {name: getattr(record, name) for name in _RECORD_TYPES}
    known["config"] = record.config.to_dict()
    # With the version, as an earlier release keeps these keys when it changes the set.
    known[_DIGEST_KEY] = {"version": record.version, "sha256": record.digest}
    if record.source is not None:
        known[_SOURCE_KEY] = {"version": record.version, **asdict(record.source)}
    return json.dumps({"format": RECORD_FORMAT, **known, **record.unknown})


def _decode_record(path: Path, metadata: Any) -> SetRecord:
    try:
        fields = json.loads(metadata[RECORD_KEY])
        written = fields.pop("format", RECORD_FORMAT)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MalformedSafetensorsError(
            f"{path.name} has no record of a set; if it is an adapter, put it into a folder as "
            "adapter_model.safetensors, with its adapter_config.json, and run bonsai-lora push"
        ) from None
    if type(written) is not int or written < 1:
        raise MalformedSafetensorsError(f"{path.name} has a record of format {written!r}")
    if written > RECORD_FORMAT:
        raise NewerFormatError(path.stem, written, RECORD_FORMAT)
    _check_types(path, fields, _RECORD_TYPES)
    if path.stem != fields["name"]:
        raise MalformedSafetensorsError(f"{path.name} is a copy of set {fields['name']!r}")
    known = {name: fields.pop(name) for name in _RECORD_TYPES}
    known["config"] = _decode_config(path, known["config"])
    (digest,) = _texts_of(fields.pop(_DIGEST_KEY, None), known["version"], "sha256")
    found = _texts_of(fields.pop(_SOURCE_KEY, None), known["version"], "reference", "sha256")
    source = None if None in found else Source(*found)
    return SetRecord(**known, digest=digest, source=source, unknown=fields)


def _texts_of(value: Any, version: int, *names: str) -> list[Any]:
    """Return fields of an object that is of this version of the set; None for each that is not."""
    if not isinstance(value, dict) or value.get("version") != version:
        return [None] * len(names)
    return [one if isinstance(one, str) else None for one in map(value.get, names)]


def _decode_config(path: Path, fields: Mapping[str, Any]) -> LoraConfig:
    _check_types(path, fields, _CONFIG_TYPES)
    if not all(type(one) is str and is_unicode(one) for one in fields["target_modules"]):
        raise MalformedSafetensorsError(f"{path.name} has target_modules that are not all text")
    try:
        return LoraConfig.from_dict(fields)
    except BonsaiLoraError as error:
        raise MalformedSafetensorsError(
            f"{path.name} has a record with an invalid config: {error}"
        ) from None


def _check_types(
    path: Path, fields: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]
) -> None:
    for name, kinds in types.items():
        value = fields.get(name)
        if type(value) not in kinds or not _is_usable(name, value):
            raise MalformedSafetensorsError(
                f"{path.name} has a record whose {name} is {as_written(value)}"
            )


def _is_usable(name: str, value: Any) -> bool:
    """Return whether a value of the right type can be answered with."""
    if isinstance(value, int):
        return 0 <= value < _INTEGER_END
    if not isinstance(value, str):
        return True
    pattern = _PATTERNS.get(name)
    return is_unicode(value) if pattern is None else pattern.fullmatch(value) is not None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and bool(abs(value) <= _MOST_FLOAT32)


def _check_size(path: Path, expected: int, got: int) -> None:
    if expected != got:
        raise MalformedSafetensorsError(
            f"{path.name} has {counted(got, 'byte')}, but its header describes {expected}: it "
            "is truncated"
        )
