"""`gc` and `verify` over a bucket, which running services may use."""

import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import BinaryIO, cast

from bonsai_lora.cli.output import EXIT_REFUSED, failed
from bonsai_lora.errors import (
    BonsaiLoraError,
    NewerFormatError,
    StoreUnreachableError,
    counted,
)
from bonsai_lora.storage.bucket import Bucket, open_bucket
from bonsai_lora.storage.bucket_gc import Collected, collect
from bonsai_lora.storage.cache import receive_blob
from bonsai_lora.storage.pointer import POINTERS, MalformedPointerError, decode_pointer


def collect_bucket(url: str, grace_hours: float) -> int:
    """Run `gc` over a bucket; return the exit code."""
    try:
        with tempfile.NamedTemporaryFile(prefix="bonsai-lora-") as file:
            found = collect(open_bucket(url), cast("BinaryIO", file), timedelta(hours=grace_hours))
    except (ValueError, StoreUnreachableError) as error:
        return failed(str(error))
    for line in _report(found):
        print(line)
    return EXIT_REFUSED if found.unreadable else 0


def _report(found: Collected) -> Iterator[str]:
    sums = found.sums
    size = counted(sums.held_bytes, "byte")
    yield f"{counted(sums.sets, 'set')}, {size} as float32; the index is written"
    if not found.is_corrected:
        yield "the sums were not counted again, as others kept writing; run it again"
    yield f"{counted(found.blobs, 'blob')} removed, {counted(found.blob_bytes, 'byte')}"
    yield f"{counted(found.tombstones, 'deleted set')} removed"
    yield f"{counted(found.staged, 'upload')} without a commit removed"
    if found.kept_tombstones:
        kept = counted(found.kept_tombstones, "deleted set")
        yield f"{kept} kept: the bucket has no conditional delete"
    for name in found.unreadable:
        yield f"{name}: its pointer cannot be read; no blob was removed"


def verify_bucket(url: str, names: list[str]) -> int:
    """Compare the blobs of the named sets, or of all, with their pointers; return the exit code."""
    is_sound = True
    try:
        bucket = open_bucket(url)
        for name in names or (one.name for one in bucket.list_all(POINTERS)):
            line = _verified(bucket, name) or ("missing" if names else None)
            if line is not None:
                is_sound = is_sound and line == "ok"
                print(f"{name}  {line}")
    except (ValueError, StoreUnreachableError) as error:
        return failed(str(error))
    return 0 if is_sound else EXIT_REFUSED


def _verified(bucket: Bucket, name: str) -> str | None:
    """Return the result for one set as text; None if it is deleted."""
    found = bucket.get(f"{POINTERS}/{name}")
    if found is None:
        return "missing"
    try:
        pointer = decode_pointer(name, found.body)
        if pointer.record is None:
            return None
        with tempfile.TemporaryFile() as file:
            pieces = bucket.pieces(pointer.blob, pointer.size)
            receive_blob(cast("BinaryIO", file), pieces, pointer)
    except NewerFormatError as error:
        return f"not verified: {error.detail}"
    except StoreUnreachableError:
        raise
    except FileNotFoundError:
        return f"bad: its blob {pointer.blob} is missing"
    except (MalformedPointerError, BonsaiLoraError) as error:
        return f"bad: {error}"
    return "ok"
