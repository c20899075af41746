"""The JSON of the Open Inference Protocol, as pydantic models."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bonsai_lora.service.models import Tensor


class TensorMetadata(BaseModel):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 stands for any number")

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorMetadata":
        """Return the answer's form."""
        return cls(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


class ServerMetadata(BaseModel):
    """What speaks here, and which extensions it has."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """The process answers."""

    live: bool = True


class ServerReady(BaseModel):
    """Models can be used; `live` too, since the protocol's text says so."""

    live: bool = True
    ready: bool = True


class ModelReady(BaseModel):
    """The model can be used."""

    name: str
    ready: bool = True


class ModelMetadata(BaseModel):
    """A set as a model."""

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
    """Triton's statistics: counts, and sums of nanoseconds."""

    model_stats: list[dict[str, Any]]


class InferTensor(BaseModel):
    """A tensor of an infer request or response."""

    name: str
    shape: list[int]
    datatype: Literal["FP32", "FP64", "FP16", "BF16", "BYTES"]
    parameters: dict[str, bool | int | float | str] | None = Field(
        None, description="binary_data_size, or shared_memory_region, _offset, _byte_size"
    )
    data: list[Any] | None = Field(None, description="row by row, flat or nested")


class InferRequestedOutput(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, bool | int | float | str] | None = Field(
        None, description="binary_data, or shared_memory_region, _offset, _byte_size"
    )


class InferRequest(BaseModel):
    """An infer request of the protocol."""

    id: str | None = None
    parameters: dict[str, bool | int | float | str] | None = Field(
        None, description="scale, binary_data_output"
    )
    inputs: list[InferTensor]
    outputs: list[InferRequestedOutput] | None = None


class InferResponse(BaseModel):
    """An infer response of the protocol."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferTensor]


class LenientModel(BaseModel):
    """No silent conversions; unknown fields are those of other servers."""

    model_config = ConfigDict(strict=True)


class IndexRequest(LenientModel):
    """What the repository index is asked."""

    ready: bool = Field(False, description="only models that are ready; here all are")


class IndexEntry(BaseModel):
    """A model of the repository."""

    name: str
    version: str
    state: Literal["READY"]
    reason: str


class RepositoryRequest(LenientModel):
    """What load and unload are asked."""

    parameters: dict[str, Any] = Field(default_factory=dict)


class RegisterRequest(LenientModel):
    """Shared memory of a client on this machine."""

    key: str = Field(description="name of the shared memory, as of shm_open")
    offset: Annotated[int, Field(ge=0, lt=2**62)] = 0
    byte_size: Annotated[int, Field(gt=0, lt=2**62)]


class RegionInfo(BaseModel):
    """A registered region."""

    name: str
    key: str
    offset: int
    byte_size: int


class OipError(BaseModel):
    """A refusal of the Open Inference Protocol."""

    error: str
