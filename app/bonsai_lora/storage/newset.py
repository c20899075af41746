"""Sets to be written: the record of the next version, and its file."""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO

from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.formats.peft import set_tensors
from bonsai_lora.storage.files import SetFiles
from bonsai_lora.storage.setfile import NewSet, SetRecord, write_header, write_set_file
from bonsai_lora.storage.source import Source
from bonsai_lora.storage.upload import ReceivedUpload

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
        new = NewSet(self._record(first_version), self.lora_set, self.adapter_config)
        if self.received is not None and write_header(new, *self.received):
            yield self.received[0].file
            return
        with files.new_file() as file:
            write_set_file(file, new)
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
