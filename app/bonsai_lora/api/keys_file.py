"""The keys file: JSON that `bonsai-lora keys` writes and the service reads while it runs."""

import logging
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from bonsai_lora.formats.identity import Identity, identity_of
from bonsai_lora.formats.names import SET_NAME_PATTERN, is_set_name
from bonsai_lora.service.keys import Key, KeyRing, Quota, Rates, Scope
from bonsai_lora.validation import fault_in_file

CHECK_SECONDS = 1.0
"""Shortest time between two looks at the file."""

_MOST_BYTES = 1 << 24
_ENDINGS = (".", "-", "_")

_log = logging.getLogger("bonsai_lora")

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class KeysFileError(ValueError):
    """The keys file cannot be used; the message is meant for the operator."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitsEntry(_Model):
    """Rates of a key."""

    rows_per_second: Rate | None = None
    requests_per_second: Rate | None = None


class QuotaEntry(_Model):
    """What the sets under a key's prefixes may hold."""

    sets: Count | None = None
    bytes: Count | None = None


class KeyEntry(_Model):
    """A key as the file has it."""

    id: str = Field(pattern="^[a-z0-9]{8}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    name: str = ""
    scopes: list[Scope] = Field(min_length=1)
    prefixes: list[str]
    expires_at: AwareDatetime | None = None
    limits: LimitsEntry = LimitsEntry()
    quota: QuotaEntry = QuotaEntry()

    @field_validator("prefixes")
    @classmethod
    def _check_prefixes(cls, prefixes: list[str]) -> list[str]:
        for prefix in prefixes:
            if prefix and not (is_set_name(prefix) and prefix.endswith(_ENDINGS)):
                raise ValueError(
                    f"the prefix {prefix!r} must end in '.', '-' or '_' and match "
                    f"{SET_NAME_PATTERN}, or be empty for all names"
                )
        return prefixes

    def to_key(self) -> Key:
        """Return the key."""
        return Key(
            self.id,
            bytes.fromhex(self.sha256),
            frozenset(self.scopes),
            tuple(self.prefixes),
            self.name,
            math.inf if self.expires_at is None else self.expires_at.timestamp(),
            Rates(**self.limits.model_dump()),
            Quota(**self.quota.model_dump()),
        )


class KeysDocument(_Model):
    """The whole file."""

    keys: list[KeyEntry]

    @field_validator("keys")
    @classmethod
    def _check_ids(cls, keys: list[KeyEntry]) -> list[KeyEntry]:
        ids = [one.id for one in keys]
        twice = next((one for one in ids if ids.count(one) > 1), None)
        if twice is not None:
            raise ValueError(f"the id {twice!r} is given twice; remove one of the keys")
        return keys

    def ring(self) -> KeyRing:
        """Return the keys by id."""
        return KeyRing({one.id: one.to_key() for one in self.keys})


def read_keys(path: Path) -> KeysDocument:
    """Return the content of a keys file.

    Raises KeysFileError if it cannot be read, is not valid, or others may write to it; logs a
    warning if others may read it.
    """
    try:
        with path.open("rb") as file:
            _check_mode(path, os.fstat(file.fileno()).st_mode)
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise KeysFileError(
            f"the keys file {path} cannot be read: {error.strerror or error}; make one with "
            "bonsai-lora keys new"
        ) from error
    if len(content) > _MOST_BYTES:
        raise KeysFileError(f"the keys file {path} is longer than {_MOST_BYTES} bytes; check it")
    try:
        return KeysDocument.model_validate_json(content)
    except ValidationError as error:
        raise KeysFileError(
            f"the keys file {path} is not valid ({fault_in_file(error, has_secrets=True)}); "
            "correct it, or write it with bonsai-lora keys"
        ) from None


def _check_mode(path: Path, mode: int) -> None:
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeysFileError(
            f"the keys file {path} has mode {stat.S_IMODE(mode):04o}, so that others could add "
            "keys; run chmod 600"
        )
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning(
            "the keys file %s has mode %04o, so that others can read it; run chmod 600",
            path,
            stat.S_IMODE(mode),
        )


class WatchedKeys:
    """The keys of a file, read again when it has changed; a bad file leaves the keys as they are.

    Raises KeysFileError at first. `on_error` is called for each bad file after that.
    """

    def __init__(self, path: Path, on_error: Callable[[], None]) -> None:
        self._path = path
        self._on_error = on_error
        self._seen = self._identity()
        self._checked = monotonic()
        self.ring = read_keys(path).ring()

    def is_changed(self) -> bool:
        """Look at the file, at most once in CHECK_SECONDS; return whether `ring` is a new one."""
        now = monotonic()
        if now - self._checked < CHECK_SECONDS:
            return False
        self._checked = now
        identity = self._identity()
        if identity == self._seen:
            return False
        self._seen = identity
        try:
            self.ring = read_keys(self._path).ring()
        except KeysFileError as error:
            _log.error("%s; the keys that were read before stay valid", error)
            self._on_error()
            return False
        _log.info("read %d keys from %s", len(self.ring.keys), self._path)
        return True

    def _identity(self) -> Identity | None:
        try:
            return identity_of(self._path.stat())
        except OSError:
            return None
