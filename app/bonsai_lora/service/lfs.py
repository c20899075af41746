"""Links that one file is uploaded to without a key, as Git LFS does, and what was uploaded there.

Who asks for a link has a key; the link is signed for the set, the file's SHA-256 and size, the id
of that key, and fifteen minutes, and is good for nothing else.
"""

import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import BinaryIO

from bonsai_lora.errors import (
    InvalidRequestError,
    LinkRefusedError,
    QuotaExceededError,
    StoreFullError,
)
from bonsai_lora.formats.names import is_sha256
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.staging import Staged
from bonsai_lora.storage.upload import Upload

BATCH_PATH = "/adapters/{set}.git/info/lfs/objects/batch"
LINK_SECONDS = 900
_MOST_STAGED = 64
"""Most files that wait for their commits under the prefixes of a key."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a link is for."""

    staged: Staged
    key: str
    """Id of the key that asked for it."""
    expires_at: int
    """Unix time."""

    def signature(self, store: SetView) -> str:
        """Return the HMAC-SHA256 of the link with the secret of the store, in hexadecimal."""
        text = json.dumps([*astuple(self.staged), self.key, self.expires_at])
        return hmac.new(store.link_secret(), text.encode(), hashlib.sha256).hexdigest()


def new_link(
    store: SetView, staged: Staged, present: Sequence[Staged], most_bytes: int
) -> Link | None:
    """Return a link that `staged` can be uploaded to; None if it is `present` already.

    Raises InvalidRequestError, and the errors of `_check_room`.
    """
    if not is_sha256(staged.sha256):
        raise InvalidRequestError(
            f"the oid is {staged.sha256[:100]!r}; send a SHA-256 in lower-case hexadecimal",
            field="oid",
        )
    if staged in present:
        return None
    _check_room(store, staged, most_bytes, present)
    return Link(staged, store.key.id, int(time.time()) + LINK_SECONDS)


def check_link(store: SetView, link: Link, signature: str) -> None:
    """Raise LinkRefusedError unless the service signed this link lately; the name is unchecked."""
    if not hmac.compare_digest(link.signature(store).encode(), signature.encode()):
        raise LinkRefusedError(
            "the link is not one that this service signed; request one from "
            f"POST {BATCH_PATH}, and use it unchanged"
        )
    if link.expires_at < time.time():
        raise LinkRefusedError(
            f"the link was good for {LINK_SECONDS // 60} minutes, which are over; request a new "
            f"one from POST {BATCH_PATH}"
        )


def stage(store: SetView, file: BinaryIO, staged: Staged, most_bytes: int) -> None:
    """Keep a complete file until a commit names it; raises the errors of `_check_room`."""
    check = partial(_check_room, store, staged, most_bytes)
    store.staging(staged.name).add(file, staged, check)


def _check_room(store: SetView, staged: Staged, most_bytes: int, present: Sequence[Staged]) -> None:
    """Raise QuotaExceededError or StoreFullError if `staged` may not wait beside `present`."""
    others = [one for one in present if one.key != staged.key]
    own = [one for one in others if store.key.owns(one.name)]
    if len(own) >= _MOST_STAGED:
        raise QuotaExceededError(
            f"{len(own)} files wait for their commits, which is the limit; commit them, or wait a "
            "day",
            got=len(own) + 1,
            limit=_MOST_STAGED,
        )
    store.check_quota(staged.name, staged.size + sum(one.size for one in own))
    free = most_bytes - sum(one.size for one in others) - staged.size
    if free < 0:
        raise StoreFullError(
            f"the file has {staged.size} bytes, but the uploads that wait for their commits may "
            f"have {most_bytes} in all; commit yours, retry later, or raise max_spill_bytes"
        )
    # However many keys do this, there is room for one more.
    waiting = sum(one.size for one in own) + staged.size
    if waiting > free and not store.key.sees_all:
        raise StoreFullError(
            f"{waiting} bytes of this key would wait for their commits, and leave {free} to other "
            "keys, which is less; commit some, wait a day, or raise max_spill_bytes"
        )


def read_staged(store: SetView, staged: Staged, upload: Upload) -> None:
    """Write a staged file to `upload`; raises InvalidRequestError if it is not there, whole."""
    digest = hashlib.sha256()
    try:
        for piece in store.staging(staged.name).pieces(staged):
            digest.update(piece)
            upload.write(piece)
    except FileNotFoundError:
        pass
    if digest.hexdigest() != staged.sha256:
        raise InvalidRequestError(
            f"the commit names the file {staged.sha256} of {staged.size} bytes, which was not "
            f"uploaded for {staged.name!r} within the last day; upload it again",
            field="oid",
        )
