"""Keys: who may do what to which sets. Pure logic; `api/keys_file.py` reads them from a file.

A key is `bl_ID_SECRET`. The id may be logged; of the secret only the SHA-256 is kept. A slow hash
would protect guessable passwords, but the secret has 256 random bits, and the check of each request
must be fast.
"""

import hashlib
import hmac
import math
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from bonsai_lora.errors import ForbiddenError, RateLimitedError
from bonsai_lora.service.rates import TokenBucket

Scope = Literal["read", "apply", "write", "pull", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_ID_LENGTH = 8
_ID_LETTERS = string.ascii_lowercase + string.digits
_TOKEN = re.compile(rb"bl_([a-z0-9]{8})_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Rates:
    """Most requests and rows per second; None for any number."""

    requests_per_second: float | None = None
    rows_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """Most sets, and most bytes of them as float32; None for any number."""

    sets: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A caller: what it may do, to which names, how often and how much."""

    id: str
    digest: bytes
    """SHA-256 of the whole key."""
    scopes: frozenset[Scope]
    prefixes: tuple[str, ...]
    """Starts of the names that the key may use; the empty one is the start of every name."""
    name: str = ""
    """What the key is for, in the operator's words."""
    expires_at: float = math.inf
    """Seconds since 1970."""
    rates: Rates = field(default_factory=Rates)
    quota: Quota = field(default_factory=Quota)

    @property
    def sees_all(self) -> bool:
        """Whether every name is the key's: it has the prefix "" or the scope admin."""
        return "" in self.prefixes or "admin" in self.scopes

    @property
    def starts(self) -> list[str]:
        """The shortest prefixes, of which no name has two."""
        if self.sees_all:
            return [""]
        found: list[str] = []
        for one in sorted(set(self.prefixes)):
            if not one.startswith(tuple(found)):
                found.append(one)
        return found

    def owns(self, name: str) -> bool:
        """Return whether `name` is one that the key may use."""
        return name.startswith(self.prefixes) or "admin" in self.scopes


ANYONE = Key("anyone", b"", frozenset(SCOPES), ("",))
"""The caller of a service without keys."""
NOBODY = Key("nobody", b"", frozenset(), ())
"""The caller without a key of a service with keys: it gets what is open to everybody."""


def may(key: Key, scope: Scope, name: str) -> bool:
    """Return whether `key` may do what `scope` stands for to the set `name`."""
    return scope in key.scopes and key.owns(name)


def narrowed(starts: Sequence[str], prefix: str) -> list[str]:
    """Return the starts of the names that begin with one of `starts` and with `prefix`."""
    if prefix.startswith(tuple(starts)):
        return [prefix]
    return [one for one in starts if one.startswith(prefix)]


def missing_scope(key: Key, scope: Scope) -> ForbiddenError:
    """Return the error of a call that needs a scope which `key` lacks."""
    return ForbiddenError(
        f"the key {key.id!r} lacks the scope {scope!r}, which this call needs; use a key that has "
        "it",
        key=key.id,
        scope=scope,
    )


def check_scope(key: Key, scope: Scope) -> None:
    """Raise ForbiddenError if `key` lacks `scope`."""
    if scope not in key.scopes:
        raise missing_scope(key, scope)


class KeyRing:
    """Keys by id, found by the token that a caller sends."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self.keys = keys

    def find(self, token: bytes) -> Key | None:
        """Return the key of a token, expired or not; None if there is none."""
        match = _TOKEN.fullmatch(token)
        key = None if match is None else self.keys.get(match[1].decode())
        digest = digest_of(token)
        if key is None or not hmac.compare_digest(key.digest, digest):
            return None
        return key


def new_token() -> tuple[str, str]:
    """Return the id of a new key, and the key."""
    number = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
    return number, f"bl_{number}_{secrets.token_urlsafe(32)}"


def digest_of(token: bytes) -> bytes:
    """Return the SHA-256 of a whole key."""
    return hashlib.sha256(token).digest()


class Meter:
    """What a key has used of its rates in one process. Thread-safe.

    `share` is this process's part of the rates, such as 1/workers.
    """

    def __init__(self, key: Key, share: float = 1.0) -> None:
        self._key = key
        rates = key.rates
        self._requests = TokenBucket.of(rates.requests_per_second, share)
        self._rows = TokenBucket.of(rates.rows_per_second, share)

    def take_request(self) -> None:
        """Count a request; raises RateLimitedError if there are too many."""
        if self._requests is not None:
            self._take(self._requests, 1, "requests_per_second")

    def take_rows(self, rows: int) -> None:
        """Count the rows of a request; raises RateLimitedError if there are too many."""
        if self._rows is not None:
            self._take(self._rows, rows, "rows_per_second")

    def _take(self, bucket: TokenBucket, amount: int, limit: str) -> None:
        wait = bucket.take(amount)
        if wait > 0:
            raise RateLimitedError(
                f"the key {self._key.id!r} has used its {limit}; retry in {wait} s",
                key=self._key.id,
                limit=limit,
                retry_seconds=wait,
            )
