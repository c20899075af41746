"""Where the content of a set was taken from, as its record keeps it."""

from dataclasses import asdict, dataclass
from typing import Any

SOURCE_KEY = "source"
"""Key of a record."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one version of a set was taken from."""

    reference: str
    """Such as `folder:my-set`."""
    sha256: str
    """Digest of the files that were read, in hexadecimal."""


def encode_source(source: Source, version: int) -> dict[str, Any]:
    """Return the value of SOURCE_KEY.

    It has the version, as an earlier release keeps this key when it changes the set.
    """
    return {"version": version, **asdict(source)}


def decode_source(value: Any, version: int) -> Source | None:
    """Return the source of this version of a set, if there is one."""
    if not isinstance(value, dict) or value.get("version") != version:
        return None
    reference, digest = value.get("reference"), value.get("sha256")
    if isinstance(reference, str) and isinstance(digest, str):
        return Source(reference, digest)
    return None
