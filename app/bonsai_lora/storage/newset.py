"""Write sets: the record of the next version, and its file."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, BinaryIO

from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import HeaderTooLargeError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.large_json import dump
from bonsai_lora.formats.peft import set_tensors
from bonsai_lora.storage.files import SetFiles
from bonsai_lora.storage.setfile import (
    CONFIG_KEY,
    MODULES_KEY,
    RECORD_KEY,
    SetRecord,
    Source,
    record_to_text,
)
from bonsai_lora.storage.upload import ReceivedUpload

_NO_DIGEST = "0" * 64
_PIECE_BYTES = 1 << 20

Received = tuple[ReceivedUpload, Mapping[str, str]]
"""An upload of exactly the tensors of a set, and the mapping from its tensor names to the set's."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class NextVersion:
    """What is to be written as the next version of a set."""

    lora_set: BonsaiLoraSet
    origin: str
    previous: SetRecord | None
    """The version to replace; None for a new set."""
    adapter_config: Mapping[str, Any] | None = None
    received: Received | None = None
    """An upload into a file of `new_file`: only its header is written then."""
    source: Source | None = None
    now: str = field(default_factory=_now)
    """RFC 3339."""

    @property
    def name(self) -> str:
        """The name of the set."""
        return self.lora_set.adapter_name

    @contextlib.contextmanager
    def file(self, files: SetFiles, first_version: int = 1) -> Iterator[BinaryIO]:
        """Give a complete temporary file; a new set begins with `first_version`.

        If the header does not fit into the file of `received`, the file is written as a whole.
        """
        new = _NewFile(self._record(first_version), self.lora_set, self.adapter_config)
        if self.received is not None and _write_header(new, *self.received):
            yield self.received[0].file
            return
        with files.new_file() as file:
            _write(file, new)
            yield file

    def _record(self, first_version: int) -> SetRecord:
        lora_set, previous = self.lora_set, self.previous
        return SetRecord(
            name=self.name,
            uid=previous.uid if previous else secrets.token_hex(8),
            version=previous.version + 1 if previous else first_version,
            created_at=previous.created_at if previous else self.now,
            updated_at=self.now,
            unknown=previous.unknown if previous else {},
            origin=self.origin,
            source=self.source,
            base_model_name=lora_set.base_model_name,
            config=lora_set.registry.config,
            adapter_count=lora_set.registry.adapter_count(),
            total_trainable_params=lora_set.total_trainable_params(),
            data_bytes=sum(one.nbytes for one in set_tensors(lora_set).values()),
        )


def _write(file: BinaryIO, stored: "_NewFile") -> None:
    """Write the file of a set; constant zero arrays become holes of a sparse file."""
    header = stored.header(_NO_DIGEST)
    file.write(header)
    file.truncate(len(header) + stored.record.data_bytes)
    digest = hashlib.sha256()
    for array in set_tensors(stored.lora_set).values():
        if array.size and not any(array.strides) and not array.flat[0]:  # one zero, broadcast
            file.seek(array.nbytes, os.SEEK_CUR)
            for piece in _zeros(array.nbytes):
                digest.update(piece)
        else:
            content = safetensors.as_bytes(array)
            file.write(content)
            digest.update(content)
    file.seek(0)
    file.write(stored.header(digest.hexdigest()))  # as long as the first


def _zeros(count: int) -> Iterator[memoryview]:
    """Yield `count` zero bytes in pieces."""
    piece = memoryview(bytes(min(count, _PIECE_BYTES)))
    for start in range(0, count, _PIECE_BYTES):
        yield piece[: count - start]


def _write_header(stored: "_NewFile", received: ReceivedUpload, names: Mapping[str, str]) -> bool:
    """Turn an upload into a set's file by writing its header; return False if it does not fit."""
    infos = received.header.tensors
    layout = {names[key]: (info.dtype, info.shape) for key, info in infos.items()}
    try:
        header = stored.header(received.digest, layout, received.header.data_start)
    except ValueError:
        return False
    received.write_header(header)
    return True


@dataclass(frozen=True, eq=False, slots=True)
class _NewFile:
    """The content of a set's file."""

    record: SetRecord
    lora_set: BonsaiLoraSet
    adapter_config: Mapping[str, Any] | None

    def header(
        self, digest: str, layout: safetensors.Layout | None = None, length: int | None = None
    ) -> bytes:
        """Return the file's header for tensors in the order of `layout` (default: the set's).

        `digest` is that of their bytes. Raises HeaderTooLargeError if it is too long to be read
        again, ValueError if it does not fit in `length` bytes.
        """
        if layout is None:
            layout = safetensors.layout_of(set_tensors(self.lora_set))
        header = safetensors.encode_header(layout, self._metadata(digest), length=length)
        if len(header) > safetensors.MAX_HEADER_BYTES:
            raise HeaderTooLargeError(
                f"the header of the set would have {len(header)} bytes, but the limit is "
                f"{safetensors.MAX_HEADER_BYTES}; use fewer or shorter module names",
                got_bytes=len(header),
                limit_bytes=safetensors.MAX_HEADER_BYTES,
            )
        return header

    def _metadata(self, digest: str) -> dict[str, str]:
        modules = {
            name: [one.config.alpha, one.scaling, one.layer, *filter(None, [one.experts])]
            for name, one in self.lora_set.registry.adapters.items()
        }
        metadata = {
            RECORD_KEY: record_to_text(replace(self.record, digest=digest)),
            "format": "pt",
            MODULES_KEY: dump(modules),
        }
        if self.adapter_config is not None:
            metadata[CONFIG_KEY] = json.dumps(self.adapter_config)
        return metadata
