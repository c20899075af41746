"""The sources file: JSON in which the operator names the origins that sets are pulled from."""

import os
import re
from abc import ABC, abstractmethod
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bonsai_lora.sources.origins import Origin
from bonsai_lora.validation import check_credential, fault_in_file, shown

_NAME = "^[a-z][a-z0-9-]{0,31}$"
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9][A-Za-z0-9._-]*)*/?")
_TAKEN = "folder"
"""How the sources of sets from --sets begin."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Url = Annotated[str, AfterValidator(lambda url: url.rstrip("/"))]


class _Entry(_Model, ABC):
    name: str = Field(pattern=_NAME)
    repositories: tuple[str, ...] = ("*",)

    def to_origin(self) -> Origin:
        """Return the origin; raises ValueError if a variable or folder that it names is missing."""
        names = {one.name for one in fields(Origin)}
        return Origin(**{**self.model_dump(include=names), **self._more()})

    @abstractmethod
    def _more(self) -> dict[str, Any]:
        """Return the fields of the origin that the entry does not have itself."""

    def _secret(self, field: str) -> str | None:
        """Return the value of the variable that a field names, if it does.

        No error shows that name: it may be the secret itself.
        """
        variable: str | None = getattr(self, field)
        if variable is None:
            return None
        found, named = os.environ.get(variable), f"variable that {field} of {self.name!r} names"
        if not found:
            raise ValueError(
                f"the environment {named} is not set; put the secret into a variable, and its name "
                "into the file"
            )
        return check_credential(f"the environment {named}", found)


class WebEntry(_Entry):
    """A hub, or a web server with folders of adapters."""

    kind: Literal["hub", "https"]
    url: Url
    hosts: frozenset[str] = frozenset()
    token_variable: str | None = None
    allow_private: bool = False
    allow_http: bool = False

    @model_validator(mode="after")
    def _check_url(self) -> "WebEntry":
        _check_address("url", self.url, allow_http=self.allow_http)
        return self

    def _more(self) -> dict[str, Any]:
        return {"token": self._secret("token_variable")}


class BucketEntry(_Entry):
    """An S3-compatible bucket with folders of adapters below a prefix."""

    kind: Literal["s3"]
    url: Url
    endpoint: Url = ""
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

    def _more(self) -> dict[str, Any]:
        access, secret = map(self._secret, ("access_key_variable", "secret_key_variable"))
        return {"credentials": None if access is None else (access, secret)}


class FolderEntry(_Entry):
    """A folder with folders of adapters."""

    kind: Literal["file"]
    path: str

    def _more(self) -> dict[str, Any]:
        folder = Path(self.path)
        if not folder.is_absolute():
            raise ValueError(f"the path {self.path!r} is relative; make it absolute")
        if not folder.is_dir():
            raise ValueError(f"the path {self.path!r} is not a folder; correct it")
        return {"folder": folder}


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
