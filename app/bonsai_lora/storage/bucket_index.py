"""The index of a bucket: all its pointers as of a time, in one immutable object.

`gc` writes it, as lines of JSON in gzip, and a small object that names it. Services answer from it
what would need every pointer; `gc` reads only the pointers that have changed since.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, cast

from bonsai_lora.errors import NewerFormatError
from bonsai_lora.storage.bucket import Bucket, ConflictError
from bonsai_lora.storage.pointer import (
    MOST_BYTES,
    MalformedPointerError,
    Pointer,
    decode_pointer,
    encode_pointer,
)

KEY = "index"
FOLDER = "indexes"
_FORMAT = 1

Entry = tuple[str, str, Pointer]
"""Name, ETag and content of a pointer."""


@dataclass(frozen=True, slots=True)
class BucketIndex:
    """An index that was read; its entries are read from the bucket as they are asked for."""

    as_of: str
    """RFC 3339."""
    etag: str
    pieces: Iterator[bytes]

    def entries(self) -> Iterator[Entry]:
        """Yield name, ETag and pointer; those that cannot be used are left out.

        Raises ValueError if the index ends before its end, as when `gc` has just removed it.
        """
        for line in _lines(self.pieces):
            try:
                fields = json.loads(line)
                name, etag = str(fields["name"]), str(fields["etag"])
                yield name, etag, decode_pointer(name, json.dumps(fields["pointer"]).encode())
            except (ValueError, TypeError, LookupError, MalformedPointerError, NewerFormatError):
                continue


def read_index(bucket: Bucket, *, unless: str | None = None) -> BucketIndex | None:
    """Return the present index, None if there is none; raises SameError if `unless` is its ETag."""
    found = bucket.get(KEY, unless=unless)
    try:
        fields = json.loads(found.body) if found is not None else {}
        if found is None or fields["format"] != _FORMAT:
            return None
        key, size, as_of = f"{FOLDER}/{fields['sha256']}", int(fields["size"]), str(fields["as_of"])
    except (ValueError, TypeError, LookupError):
        return None
    return BucketIndex(as_of, found.etag, bucket.pieces(key, size))


def write_index(bucket: Bucket, file: BinaryIO, entries: Iterable[Entry], as_of: str) -> str:
    """Write the index, by way of an empty temporary file; return the key of its large object."""
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0, compresslevel=5) as packed:
        for name, etag, pointer in entries:
            content = json.loads(encode_pointer(pointer))
            fields = {"name": name, "etag": etag, "pointer": content}
            packed.write(json.dumps(fields).encode() + b"\n")
    file.flush()
    size = file.tell()
    file.seek(0)
    digest = hashlib.file_digest(cast("BufferedRandom", file), "sha256").hexdigest()
    bucket.write(f"{FOLDER}/{digest}", Path(str(file.name)))
    body = {"format": _FORMAT, "as_of": as_of, "size": size, "sha256": digest}
    for _ in range(3):  # the last of several that run at once stays
        present = bucket.get(KEY)
        try:
            bucket.put(KEY, json.dumps(body).encode(), replaces=present.etag if present else None)
            break
        except ConflictError:
            continue
    return f"{FOLDER}/{digest}"


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a gzip stream; raises ValueError if it is damaged or a line too long."""
    unpack = zlib.decompressobj(wbits=31)
    rest = b""
    try:
        for piece in pieces:
            data = unpack.decompress(piece, MOST_BYTES)
            while data:
                *lines, rest = (rest + data).split(b"\n")
                yield from lines
                if len(rest) > 2 * MOST_BYTES:
                    raise ValueError("a line of the index is too long")
                data = unpack.decompress(unpack.unconsumed_tail, MOST_BYTES)
    except (zlib.error, FileNotFoundError) as error:
        raise ValueError(f"the index cannot be read: {error}") from None
    if not unpack.eof:
        raise ValueError("the index is cut off")
