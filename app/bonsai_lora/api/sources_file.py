"""The sources file: JSON in which the operator names the origins that sets are pulled from."""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bonsai_lora.sources.origins import Origin
from bonsai_lora.validation import check_credential, fault_in_file, shown

_NAME = "^[a-z][a-z0-9-]{0,31}$"
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9][A-Za-z0-9._-]*)*/?")
_TAKEN = "folder"
"""How the sources of sets from --sets begin."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Entry(_Model):
    name: str = Field(pattern=_NAME)
    repositories: list[str] = ["*"]


class WebEntry(_Entry):
    """A hub, or a web server with folders of adapters."""

    kind: Literal["hub", "https"]
    url: str
    hosts: list[str] = []
    token_variable: str | None = None
    allow_private: bool = False
    allow_http: bool = False

    @model_validator(mode="after")
    def _check_url(self) -> "WebEntry":
        _check_address("url", self.url, allow_http=self.allow_http)
        return self

    def to_origin(self) -> Origin:
        """Return the origin; raises ValueError if the variable of the token is not set."""
        variable = self.token_variable
        token = None if variable is None else _secret(self.name, "token_variable", variable)
        return Origin(
            self.name,
            self.kind,
            url=self.url.rstrip("/"),
            repositories=tuple(self.repositories),
            hosts=frozenset(self.hosts),
            token=token,
            allow_private=self.allow_private,
        )


class BucketEntry(_Entry):
    """An S3-compatible bucket with folders of adapters below a prefix."""

    kind: Literal["s3"]
    url: str
    endpoint: str = ""
    region: str = Field("", pattern="^[a-z0-9-]*$")
    access_key_variable: str | None = None
    secret_key_variable: str | None = None
    allow_private: bool = False
    allow_http: bool = False

    @model_validator(mode="after")
    def _check(self) -> "BucketEntry":
        if not _BUCKET.fullmatch(self.url):
            raise ValueError(f"the url {shown(self.url)} must be s3://BUCKET or s3://BUCKET/PREFIX")
        if self.endpoint:
            _check_address("endpoint", self.endpoint, allow_http=self.allow_http)
        if (self.access_key_variable is None) is not (self.secret_key_variable is None):
            raise ValueError("access_key_variable and secret_key_variable belong together")
        if find_spec("obstore") is None:
            raise ValueError("a bucket needs obstore, which is not installed; pip install obstore")
        return self

    def to_origin(self) -> Origin:
        """Return the origin; raises ValueError if the variable of a key is not set."""
        credentials = None
        if self.access_key_variable is not None and self.secret_key_variable is not None:
            credentials = (
                _secret(self.name, "access_key_variable", self.access_key_variable),
                _secret(self.name, "secret_key_variable", self.secret_key_variable),
            )
        return Origin(
            self.name,
            "s3",
            url=self.url.rstrip("/"),
            repositories=tuple(self.repositories),
            endpoint=self.endpoint.rstrip("/"),
            region=self.region,
            credentials=credentials,
            allow_private=self.allow_private,
            allow_http=self.allow_http,
        )


class FolderEntry(_Entry):
    """A folder with folders of adapters."""

    kind: Literal["file"]
    path: str

    def to_origin(self) -> Origin:
        """Return the origin; raises ValueError if the folder does not exist."""
        folder = Path(self.path)
        if not folder.is_absolute():
            raise ValueError(f"the path {self.path!r} is relative; make it absolute")
        if not folder.is_dir():
            raise ValueError(f"the path {self.path!r} is not a folder; correct it")
        return Origin(self.name, "file", folder=folder, repositories=tuple(self.repositories))


class SourcesDocument(_Model):
    """The whole file."""

    sources: list[Annotated[WebEntry | BucketEntry | FolderEntry, Field(discriminator="kind")]]

    @model_validator(mode="after")
    def _check_names(self) -> "SourcesDocument":
        names = [one.name for one in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("two origins have the same name")
        if _TAKEN in names:
            raise ValueError(f"the name {_TAKEN!r} means the folder of --sets")
        return self


def _check_address(field: str, url: str, *, allow_http: bool) -> None:
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ValueError(f"the {field} has a password; name a variable with the secret instead")
    parts = urlsplit(url)
    schemes = ("https", "http") if allow_http else ("https",)
    if parts.scheme not in schemes or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(
            f"the {field} {shown(url)} must begin with {' or '.join(schemes)}:// and have no query"
        )


def _secret(origin: str, field: str, variable: str) -> str:
    """Return the value of a variable, whose name no error shows: it may be the secret itself."""
    found, named = os.environ.get(variable), f"variable that {field} of {origin!r} names"
    if not found:
        raise ValueError(
            f"the environment {named} is not set; put the secret into a variable, and its name "
            "into the file"
        )
    return check_credential(f"the environment {named}", found)


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
        fault = fault_in_file(error, tags=("hub", "https", "s3", "file"))
        raise ValueError(f"the sources file {path} is not valid ({fault}); correct it") from None
    except OSError as error:
        raise ValueError(
            f"the sources file {path} cannot be read: {error.strerror or error}; check --sources"
        ) from None
    except ValueError as error:
        raise ValueError(f"the sources file {path} cannot be used: {error}") from None
