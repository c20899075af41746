"""The sources file: JSON in which the operator names the origins that sets are pulled from."""

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bonsai_lora.mistakes import expectation
from bonsai_lora.sources.origins import Origin

_NAME = "^[a-z][a-z0-9-]{0,31}$"
_TAKEN = "folder"
"""How the sources of sets from --sets begin."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WebEntry(_Model):
    """A hub, or a web server with folders of adapters."""

    name: str = Field(pattern=_NAME)
    kind: Literal["hub", "https"]
    url: str
    repositories: list[str] = ["*"]
    hosts: list[str] = []
    token_variable: str | None = None
    allow_private: bool = False
    allow_http: bool = False

    @model_validator(mode="after")
    def _check_url(self) -> "WebEntry":
        parts = urlsplit(self.url)
        schemes = ("https", "http") if self.allow_http else ("https",)
        if parts.scheme not in schemes or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"the url {self.url!r} must begin with {' or '.join(schemes)}:// and have no query"
            )
        if "@" in parts.netloc:
            raise ValueError("the url has a password; name the variable of a token_variable")
        return self

    def to_origin(self) -> Origin:
        """Return the origin; raises ValueError if the variable of the token is not set."""
        token = None
        if self.token_variable is not None:
            token = os.environ.get(self.token_variable)
            if not token:
                raise ValueError(f"the variable {self.token_variable} of a token is not set")
        return Origin(
            self.name,
            self.kind,
            url=self.url.rstrip("/"),
            repositories=tuple(self.repositories),
            hosts=frozenset(self.hosts),
            token=token,
            allow_private=self.allow_private,
        )


class FolderEntry(_Model):
    """A folder with folders of adapters."""

    name: str = Field(pattern=_NAME)
    kind: Literal["file"]
    path: str
    repositories: list[str] = ["*"]

    def to_origin(self) -> Origin:
        """Return the origin; raises ValueError if the folder does not exist."""
        folder = Path(self.path)
        if not folder.is_absolute() or not folder.is_dir():
            raise ValueError(f"the path {self.path!r} must be absolute, and a folder")
        return Origin(self.name, "file", folder=folder, repositories=tuple(self.repositories))


class SourcesDocument(_Model):
    """The whole file."""

    sources: list[Annotated[WebEntry | FolderEntry, Field(discriminator="kind")]]

    @model_validator(mode="after")
    def _check_names(self) -> "SourcesDocument":
        names = [one.name for one in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("two origins have the same name")
        if _TAKEN in names:
            raise ValueError(f"the name {_TAKEN!r} means the folder of --sets")
        return self


def read_sources(path: Path | None) -> dict[str, Origin]:
    """Return the origins of a file by name, none without a file.

    Raises ValueError, with a text for the operator, if it cannot be used.
    """
    if path is None:
        return {}
    try:
        document = SourcesDocument.model_validate_json(path.read_bytes())
        return {one.name: one.to_origin() for one in document.sources}
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(
            f"the sources file {path} is not valid: {place}: {expectation(first)}"
        ) from None
    except OSError as error:
        raise ValueError(
            f"the sources file {path} cannot be read: {error.strerror or error}; check --sources"
        ) from None
    except ValueError as error:
        raise ValueError(f"the sources file {path} cannot be used: {error}; correct it") from None
