"""The JSON of the Open Inference Protocol as pydantic models."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bonsai_lora.api.schemas import InfoModel


class TensorMetadata(InfoModel):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 stands for any size")


class ServerMetadata(BaseModel):
    """The server's name, version and protocol extensions."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """The server is running."""

    live: bool = True


class ServerReady(BaseModel):
    """The server is ready; `live` is included as the protocol's specification asks."""

    live: bool = True
    ready: bool = True


class ModelReady(BaseModel):
    """The model is ready."""

    name: str
    ready: bool = True


class ModelMetadata(BaseModel):
    """A set described as a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelConfig(BaseModel):
    """Triton's model configuration."""

    model_config = ConfigDict(extra="allow")

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]


class ModelStatistics(BaseModel):
    """Triton's model statistics: counts and total durations in nanoseconds."""

    model_stats: list[dict[str, Any]]


class InferTensor(BaseModel):
    """A tensor of an infer request or response."""

    name: str
    shape: list[int]
    datatype: Literal["FP32", "FP64", "FP16", "BF16", "INT32", "INT64", "BYTES"]
    parameters: dict[str, bool | int | float | str] | None = Field(
        None,
        description="`binary_data_size`, or `shared_memory_region`, `shared_memory_offset` and "
        "`shared_memory_byte_size`",
    )
    data: list[Any] | None = Field(None, description="row-major, flat or nested")


class InferRequestedOutput(BaseModel):
    """A requested output."""

    name: str
    parameters: dict[str, bool | int | float | str] | None = Field(
        None,
        description="`binary_data`, or `shared_memory_region`, `shared_memory_offset` and "
        "`shared_memory_byte_size`",
    )


class InferRequest(BaseModel):
    """An inference request."""

    id: str | None = None
    parameters: dict[str, bool | int | float | str] | None = Field(
        None, description="`scale`, `binary_data_output`"
    )
    inputs: list[InferTensor]
    outputs: list[InferRequestedOutput] | None = None


class InferResponse(BaseModel):
    """An inference response."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferTensor]


class LenientModel(BaseModel):
    """Refuses implicit conversions; ignores unknown fields, which other servers define."""

    model_config = ConfigDict(strict=True)


class IndexRequest(LenientModel):
    """A request for the repository index."""

    ready: bool = Field(False, description="list only models that are ready; all sets are")


class IndexEntry(BaseModel):
    """A model in the repository."""

    name: str
    version: str
    state: Literal["READY"]
    reason: str


class RepositoryRequest(LenientModel):
    """A request to load or unload a model."""

    parameters: dict[str, Any] = Field(default_factory=dict)


class RegisterRequest(LenientModel):
    """A region to register: shared memory created by a client on this machine."""

    key: str = Field(description="name of the shared memory object, as given to shm_open")
    offset: Annotated[int, Field(ge=0, lt=2**62)] = 0
    byte_size: Annotated[int, Field(gt=0, lt=2**62)]


class RegionInfo(InfoModel):
    """A registered shared-memory region."""

    name: str
    key: str
    offset: int
    byte_size: int


class OipError(BaseModel):
    """An error of the Open Inference Protocol."""

    error: str
