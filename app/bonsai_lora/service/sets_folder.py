"""Sets of a folder of adapters, which are imported when the service starts.

Each subfolder that PEFT or MLX wrote, and each GGUF LoRA, is a set with its name. The folder is
the truth: a set is imported if it is absent, or if what is stored was made of different files.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.errors import (
    BodyTooLargeError,
    BonsaiLoraError,
    InvalidAdapterError,
    StoreUnreachableError,
    counted,
)
from bonsai_lora.formats.foreign import check_config_start
from bonsai_lora.formats.peft_config import CONFIG_BYTES, CONFIG_FILE, MODEL_FILE
from bonsai_lora.service import gguf_lora, sets
from bonsai_lora.service.budget import Budget, Reservation
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.setfile import SetRecord, Source
from bonsai_lora.storage.upload import Upload, WholeUpload

MODEL_FILES = (MODEL_FILE, "adapters.safetensors")
GGUF_SUFFIX = ".gguf"


Outcome = Literal["imported", "unchanged", "refused"]


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one entry of the folder."""

    name: str
    outcome: Outcome
    reason: str = ""
    """Why it was refused."""
    warnings: list[str] = field(default_factory=list)


def import_folder(
    store: SetView, memory: Budget, bases: BaseFolder, folder: Path
) -> Iterator[Found]:
    """Import each adapter of `folder` that is not stored yet; yield what became of each entry.

    Hidden entries and other files are ignored. An adapter that is refused, as an upload of it would
    be, leaves the set as it is. Raises OSError if the folder cannot be listed, and
    StoreUnreachableError.
    """
    for path in sorted(folder.iterdir()):
        is_gguf = path.suffix == GGUF_SUFFIX and path.is_file()
        if path.name.startswith(".") or not (is_gguf or path.is_dir()):
            continue
        name = path.stem if is_gguf else path.name
        try:
            yield _import(store, memory, bases, name, path)
        except StoreUnreachableError:
            raise
        except (BonsaiLoraError, OSError) as error:
            yield Found(name, "refused", str(error))


def _import(store: SetView, memory: Budget, bases: BaseFolder, name: str, path: Path) -> Found:
    files = [path] if path.suffix == GGUF_SUFFIX and path.is_file() else _adapter_files(path)
    for file in files:
        _check_size(file, store.limits.max_upload_bytes)
    source = Source(f"folder:{path.name}", _digest(files))
    store.check_name(name)
    present = store.find_record(name)
    if present is not None and present.source == source:  # before anything is copied
        return Found(name, "unchanged")
    with store.new_file() as target, Reservation(memory) as reserved:
        if len(files) == 1:
            whole = WholeUpload(target)
            _copy(files[0], whole)
            made = gguf_lora.import_gguf(
                store, bases, name, whole, reserved.add, _replace, source=source
            )
        else:
            upload = Upload(target, store.limits.max_header_bytes)
            config = files[0].read_bytes()
            check_config_start(config)
            _copy(files[1], upload)
            made = sets.import_adapter(store, name, config, upload, _replace, source=source)
    outcome: Outcome = "imported" if made.is_changed else "unchanged"
    return Found(name, outcome, warnings=made.warnings)


def _replace(_: SetRecord | None) -> None:
    """Allow any version, or none, to be replaced."""


def _adapter_files(folder: Path) -> list[Path]:
    """Return the configuration and weights of an adapter; raises InvalidAdapterError."""
    config = folder / CONFIG_FILE
    weights = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    if not config.is_file() or len(weights) != 1:
        has = f"has {CONFIG_FILE}" if config.is_file() else f"has no {CONFIG_FILE}"
        raise InvalidAdapterError(
            f"the folder {folder.name!r} {has} and {counted(len(weights), 'file')} of weights; "
            f"give it {CONFIG_FILE} and one of {' and '.join(MODEL_FILES)}"
        )
    _check_size(config, CONFIG_BYTES)
    return [config, weights[0]]


def _check_size(file: Path, limit: int) -> None:
    size = file.stat().st_size
    if size > limit:
        raise BodyTooLargeError(
            f"{file.name} has {size} bytes, but the limit is {limit}; raise max_upload_bytes",
            got_bytes=size,
            limit_bytes=limit,
        )


def _digest(files: list[Path]) -> str:
    """Return the SHA-256 of the files' names and digests."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {content}\n".encode())
    return whole.hexdigest()


def _copy(path: Path, upload: Upload | WholeUpload) -> None:
    with path.open("rb") as file:
        shutil.copyfileobj(file, upload)
