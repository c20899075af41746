"""Sets to be written: the record of the next version, and its file."""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.formats.peft import set_tensors
from bonsai_lora.storage.files import SetFiles
from bonsai_lora.storage.setfile import NewSet, SetRecord, write_header, write_set_file
from bonsai_lora.storage.source import Source
from bonsai_lora.storage.upload import ReceivedUpload

Received = tuple[ReceivedUpload, Mapping[str, str]]
"""An upload of exactly the tensors of a set, and the mapping from its tensor names to the set's."""


def next_version(
    lora_set: BonsaiLoraSet,
    *,
    origin: str,
    now: str,
    previous: SetRecord | None,
    adapter_config: Mapping[str, Any] | None,
    source: Source | None,
    version: int = 1,
) -> NewSet:
    """Return `lora_set` as the version after `previous`, or as `version` of a new set.

    `now` is RFC 3339.
    """
    record = SetRecord(
        name=lora_set.adapter_name,
        uid=previous.uid if previous else secrets.token_hex(8),
        version=previous.version + 1 if previous else version,
        created_at=previous.created_at if previous else now,
        updated_at=now,
        unknown=previous.unknown if previous else {},
        origin=origin,
        source=source,
        base_model_name=lora_set.base_model_name,
        config=lora_set.registry.config,
        adapter_count=lora_set.registry.adapter_count(),
        total_trainable_params=lora_set.total_trainable_params(),
        data_bytes=sum(one.nbytes for one in set_tensors(lora_set).values()),
    )
    return NewSet(record, lora_set, adapter_config)


@contextlib.contextmanager
def file_of(files: SetFiles, new: NewSet, received: Received | None) -> Iterator[BinaryIO]:
    """Give a temporary file with the content of a set: that of `received` under a new header.

    If the header does not fit there, the file is written as a whole.
    """
    if received is not None and write_header(new, *received):
        yield received[0].file
        return
    with files.new_file() as file:
        write_set_file(file, new)
        yield file
