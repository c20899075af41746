"""Models of JSON answers about base checkpoints and merged models."""

from typing import Literal

from pydantic import BaseModel, Field


class BaseFile(BaseModel):
    """A file of a base checkpoint."""

    name: str
    size_bytes: int


class BaseInfo(BaseModel):
    """A base checkpoint."""

    name: str
    format: Literal["safetensors", "gguf"]
    architecture: str = Field(
        description="family of the model, such as `qwen3`; empty if it is unknown"
    )
    files: list[BaseFile]
    dtypes: dict[str, int] = Field(
        description="number of parameters by dtype; of a GGUF file, number of tensors by type"
    )
    parameter_count: int
    ignored_files: list[str] = Field(
        description="files and folders beside them that are no part of the model"
    )


class BaseList(BaseModel):
    """The base checkpoints."""

    bases: list[BaseInfo]
    bad: dict[str, str] = Field(
        description="folders and files that are not a readable checkpoint: the reason by name"
    )


class MergedFileInfo(BaseModel):
    """A file of a merged model."""

    name: str
    size_bytes: int
    etag: str


class MergedFiles(BaseModel):
    """The files of a merged model."""

    files: list[MergedFileInfo]
