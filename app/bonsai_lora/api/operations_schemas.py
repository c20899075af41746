"""The JSON of health checks as pydantic models; their docstrings appear in OpenAPI."""

from typing import Literal

from pydantic import BaseModel, Field


class Health(BaseModel):
    """The process is alive."""

    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """The store can be read."""

    status: Literal["ready"] = "ready"
    sets: int
    bad_file_count: int = Field(description="files that could not be read and were moved aside")
    newer_file_count: int = Field(
        description="sets that a newer release wrote; their files are left untouched"
    )
    not_imported_count: int = Field(
        description="files and folders of others in the store's folder; nothing is imported there"
    )
    bad_files: dict[str, str] | None = Field(
        None, description="the reason for each bad file by set name; absent if there are keys"
    )
    newer_files: list[str] | None = Field(
        None, description="the names of sets of a newer release; absent if there are keys"
    )
    not_imported: dict[str, str] | None = Field(
        None, description="what to do, by name of such a file or folder; absent if there are keys"
    )
    store_writable: bool = Field(description="whether sets can be created, changed and deleted")
    store: Literal["reachable", "unreachable"] | None = Field(
        None,
        description="whether the bucket answers; cached sets are served meanwhile; absent if the "
        "store is a folder",
    )
    bases_readable: bool | None = Field(
        description="whether the folder of bases exists; null if the service has no such folder",
    )
