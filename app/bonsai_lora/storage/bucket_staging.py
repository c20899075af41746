"""Uploads that wait in a bucket for the commit that names them; any machine may make that."""

import secrets
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from bonsai_lora.errors import StoreUnreachableError
from bonsai_lora.storage.bucket import Bucket, ConflictError, Listed
from bonsai_lora.storage.staging import (
    FOLDER,
    SECRET,
    SECRET_BYTES,
    STAGED_SECONDS,
    Check,
    Staged,
    checked_secret,
    staged_of,
)


class BucketStaging:
    """The objects below `staged/` of a bucket; a `Staging`.

    What `check` sees may change before the object is written: machines have no lock between them.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._secret: bytes | None = None

    def secret(self) -> bytes:
        """Return the secret of the store, which is made when it is first needed."""
        if self._secret is None:
            key = f"{FOLDER}/{SECRET}"
            found = self._bucket.get(key)
            if found is None:
                with suppress(ConflictError):  # a different machine was faster
                    self._bucket.put(key, secrets.token_bytes(SECRET_BYTES), replaces=None)
                found = self._bucket.get(key)
            self._secret = checked_secret(b"" if found is None else found.body, key)
        return self._secret

    def listed(self) -> list[Staged]:
        """Return all objects."""
        return [one for one, _ in self._entries()]

    def add(self, file: BinaryIO, staged: Staged, check: Check) -> None:
        """Write a complete file as a staged object, if `check` allows it."""
        check(self.listed())
        file.flush()
        self._bucket.write(_key(staged), Path(str(file.name)))

    def pieces(self, staged: Staged) -> Iterator[bytes]:
        """Yield an object, nothing unless it has the right length; raises FileNotFoundError."""
        return self._bucket.pieces(_key(staged), staged.size)

    def remove(self, staged: Staged) -> None:
        """Remove an object; one that stays, as the bucket is away, is removed after a day."""
        with suppress(StoreUnreachableError):
            self._bucket.delete(_key(staged))

    def expire(self) -> int:
        """Remove what has waited too long by the bucket's clock, and return how many."""
        entries = self._entries()
        if not entries:
            return 0
        before = self._bucket.now() - timedelta(seconds=STAGED_SECONDS)
        old = [one for one, listed in entries if listed.modified < before]
        for one in old:
            self._bucket.delete(_key(one))
        return len(old)

    def _entries(self) -> list[tuple[Staged, Listed]]:
        named = [(staged_of(one.name, one.size), one) for one in self._bucket.list_all(FOLDER)]
        return [(staged, one) for staged, one in named if staged is not None]


def _key(staged: Staged) -> str:
    return f"{FOLDER}/{staged.key}"
