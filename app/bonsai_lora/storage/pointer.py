"""Pointers: small objects of a bucket that say which blob is the current version of a set.

A pointer is input: everything in it is checked, and the blob's name follows from the rest.
"""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from bonsai_lora.errors import BonsaiLoraError, HeaderTooLargeError, NewerFormatError
from bonsai_lora.formats.names import is_set_name, is_sha256
from bonsai_lora.storage.index import Sums, sums_of
from bonsai_lora.storage.setfile import SetRecord, record_from_text, record_to_text

POINTERS = "sets"
"""Folder of the pointers; each has the name of its set."""
BLOBS = "blobs"
"""Folder of the blobs, in folders by the first two digits of their SHA-256."""
FORMAT = 1
"""The format that is written and the newest that can be read."""
MOST_BYTES = 1 << 20
_UID = re.compile("[A-Za-z0-9._-]{1,64}")
_INTEGER_END = 1 << 53


class MalformedPointerError(Exception):
    """A pointer that this program did not write; the text says why."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """The current version of a set, or what is left of a deleted one."""

    uid: str
    version: int
    record: SetRecord | None
    """None if the set is deleted; versions go on if its name comes back."""
    size: int = 0
    """Length of the blob in bytes."""
    sha256: str = ""
    """SHA-256 of the whole blob, in hexadecimal."""

    @property
    def blob(self) -> str:
        """The key of the blob, which no other content has."""
        digest = self.sha256
        return f"{BLOBS}/{digest[:2]}/{self.uid}-{self.version}-{digest[:16]}.safetensors"

    def sums(self) -> Sums:
        """Return what the set adds to the sums."""
        return Sums() if self.record is None else sums_of(self.record)


def encode_pointer(pointer: Pointer) -> bytes:
    """Return a pointer as JSON; raises HeaderTooLargeError if it is over a mebibyte."""
    # No two writes are alike, so that each writer can tell whether an object is its own.
    fields: dict[str, Any] = {"format": FORMAT, "nonce": secrets.token_hex(8)}
    if pointer.record is None:
        fields |= {"deleted": True, "uid": pointer.uid, "version": pointer.version}
    else:
        fields |= {
            "record": json.loads(record_to_text(pointer.record)),
            "blob": pointer.blob,
            "size": pointer.size,
            "sha256": pointer.sha256,
        }
    body = json.dumps(fields).encode()
    if len(body) > MOST_BYTES:
        raise HeaderTooLargeError(
            f"the record of the set would have {len(body)} bytes, but a bucket takes at most "
            f"{MOST_BYTES}; use fewer or shorter target_modules",
            got_bytes=len(body),
            limit_bytes=MOST_BYTES,
        )
    return body


def decode_pointer(name: str, body: bytes) -> Pointer:
    """Return the pointer of set `name`.

    Raises MalformedPointerError, and NewerFormatError if a newer release wrote it.
    """
    try:
        fields = json.loads(body) if len(body) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not is_set_name(name):
        raise MalformedPointerError("it is not a JSON object of up to a mebibyte")
    written = fields.get("format")
    if type(written) is not int or written < 1:
        raise MalformedPointerError(f"it has the format {str(written)[:40]!r}")
    if written > FORMAT:
        raise NewerFormatError(name, written, FORMAT)
    if fields.get("deleted") is True:
        return _tombstone(fields)
    return _checked(name, fields)


def _tombstone(fields: dict[str, Any]) -> Pointer:
    uid, version = fields.get("uid"), fields.get("version")
    if not isinstance(uid, str) or not _UID.fullmatch(uid) or not _is_count(version):
        raise MalformedPointerError("it is of a deleted set without uid and version")
    return Pointer(uid, int(version), None)  # type: ignore[arg-type]


def _checked(name: str, fields: dict[str, Any]) -> Pointer:
    try:
        record = record_from_text(name, json.dumps(fields["record"]))
    except NewerFormatError:
        raise
    except (BonsaiLoraError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise MalformedPointerError(getattr(error, "detail", "it has no record")) from None
    size, sha256 = fields.get("size"), fields.get("sha256")
    if not _is_count(size) or not isinstance(sha256, str) or not is_sha256(sha256):
        raise MalformedPointerError("it has no size and SHA-256 of a blob")
    pointer = Pointer(record.uid, record.version, record, int(size), sha256)  # type: ignore[arg-type]
    if fields.get("blob") != pointer.blob:
        raise MalformedPointerError(
            f"its blob is {str(fields.get('blob'))[:200]!r}; expected {pointer.blob}"
        )
    return pointer


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _INTEGER_END
