"""Origins by name, and references to adapters in them: never a URL or a token of the caller's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from bonsai_lora.errors import InvalidRequestError, SourcesOffError, SourceUnknownError

Kind = Literal["hub", "https", "s3", "file"]

_SEGMENT = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"(?P<origin>[a-z][a-z0-9-]{{0,31}}):(?P<path>{_SEGMENT}(?:/{_SEGMENT}){{0,7}})"
    rf"(?:@(?P<revision>{_SEGMENT}))?"
)


@dataclass(frozen=True, slots=True)
class Origin:
    """A place that adapters may be pulled from."""

    name: str
    kind: Kind
    url: str = ""
    """Of a hub, web server or bucket, without a slash at the end."""
    folder: Path = Path()
    """Of files."""
    repositories: tuple[str, ...] = ("*",)
    """Patterns of the paths that may be pulled, such as `acme/*`."""
    hosts: frozenset[str] = frozenset()
    """Further hosts that the origin may redirect to."""
    token: str | None = field(default=None, repr=False)
    endpoint: str = ""
    """Of a bucket; if empty, what the environment names, or Amazon's."""
    region: str = ""
    credentials: tuple[str, str] | None = field(default=None, repr=False)
    """Access key and secret for a bucket; if None, those of the environment or the machine."""
    allow_private: bool = False
    """Whether the hosts may have addresses that are not public."""
    allow_http: bool = False
    """Whether the endpoint of a bucket may be plain HTTP."""


@dataclass(frozen=True, slots=True)
class Reference:
    """An adapter in an origin."""

    origin: Origin
    path: str
    revision: str | None
    etags: Mapping[str, str] = field(default_factory=dict)
    """Of the files in a bucket for which the revision stands, by name."""

    def at(self, revision: str | None) -> str:
        """Return the text of the reference with a revision."""
        ending = "" if revision is None else f"@{revision}"
        return f"{self.origin.name}:{self.path}{ending}"


def find(origins: Mapping[str, Origin], text: str) -> Reference:
    """Return what a reference such as `hub:acme/sql-lora@main` means.

    Raises SourcesOffError without origins, InvalidRequestError for text that is not a reference,
    SourceUnknownError for an origin that does not exist, or a path that it does not allow.
    """
    if not origins:
        raise SourcesOffError(
            "this service pulls from no sources; start it with --sources, or upload the adapter"
        )
    parts = _REFERENCE.fullmatch(text)
    if parts is None:
        raise InvalidRequestError(
            f"the source {text[:200]!r} is not a reference; write ORIGIN:PATH or "
            "ORIGIN:PATH@REVISION, such as hub:acme/sql-lora@main",
            field="source",
        )
    origin = origins.get(parts["origin"])
    path, revision = parts["path"], parts["revision"]
    if origin is None or not any(fnmatchcase(path, one) for one in origin.repositories):
        raise SourceUnknownError(
            f"the source {text[:200]!r} is not in an origin of this service, or not one that it "
            f"allows; use one of {', '.join(sorted(origins))}",
            source=text[:200],
            expected=sorted(origins),
        )
    if revision is not None and origin.kind not in ("hub", "s3"):
        raise InvalidRequestError(
            f"the source {text[:200]!r} has a revision, which only hubs and buckets have; leave it "
            "out",
            field="source",
        )
    return Reference(origin, path, revision)
