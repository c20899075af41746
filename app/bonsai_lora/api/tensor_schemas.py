"""The JSON form of tensors in the HTTP API as pydantic models; their docstrings appear in OpenAPI.

They describe bodies that `bonsai_lora.wire` reads and writes without pydantic.
"""

from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat

from bonsai_lora.api.schemas import RequestModel
from bonsai_lora.wire.stacks import MAX_SCALE, MAX_STACK

Rows = list[list[float]]
Vectors = Rows | list[float]


class SetWeights(RequestModel):
    """The two low-rank factors of an adapter."""

    lora_A: Rows = Field(description="(r, d_in)")  # noqa: N815 - the contract's name
    lora_B: Rows = Field(description="(d_out, r)")  # noqa: N815 - the contract's name
    alpha: FiniteFloat | None = Field(None, description="default: the set's")


class WeightedSet(RequestModel):
    """A set and the weight of its delta."""

    set: str
    weight: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


Stack = Annotated[list[WeightedSet | str], Field(max_length=MAX_STACK)]
Stacked = Annotated[
    Stack | None, Field(description="additional sets whose weighted deltas are added")
]
Versions = Annotated[
    dict[str, int] | None, Field(description="version used of each set, if `sets` was given")
]

Experts = Annotated[
    list[int] | None,
    Field(description="number of the expert of each row, from 0; for fused experts only"),
]


class ApplyRequest(RequestModel):
    """Vectors for one module."""

    inputs: Vectors = Field(description="a batch (rows, d_in) or one vector (d_in,)")
    base_outputs: Vectors | None = Field(
        None, description="W·x without bias, for DoRA modules only: (rows, d_out) or (d_out,)"
    )
    sets: Stacked = None
    experts: Experts = None


class ApplyAnswer(BaseModel):
    """The adapter's delta, computed from one version of the set."""

    set: str
    module: str
    version: int
    versions: Versions = None
    outputs: Vectors


class ApplyManyRequest(RequestModel):
    """Vectors by module, or one batch shared by all `module` parameters."""

    inputs: dict[str, Vectors] | Vectors
    sets: Stacked = None
    base_outputs: dict[str, Vectors] | None = Field(
        None, description="W·x without bias, for DoRA modules only"
    )
    experts: Experts = None


class ApplyManyAnswer(BaseModel):
    """The delta of each adapter, from one version of the set."""

    set: str
    version: int
    versions: Versions = None
    outputs: dict[str, Vectors]


class ApplyMixedRequest(RequestModel):
    """Vectors for one module, each with its own sets."""

    module: str
    sets: list[str | WeightedSet | Stack | None] = Field(
        description="one entry per row: the name of a set, null for none, or sets with weights"
    )
    inputs: Vectors = Field(description="a batch (rows, d_in) or one vector (d_in,)")
    base_outputs: Vectors | None = Field(
        None, description="W·x without bias, for DoRA sets only: (rows, d_out) or (d_out,)"
    )
    experts: Experts = None


class ApplyMixedAnswer(BaseModel):
    """The delta of each row, in the order of the rows."""

    module: str
    versions: dict[str, int] = Field(description="version used of each set")
    outputs: Vectors


class MergeRequest(RequestModel):
    """A small weight matrix (d_out, d_in)."""

    weights: Rows


class MergeAnswer(BaseModel):
    """The merged weights W + scaling * B @ A."""

    set: str
    module: str
    version: int
    weights: Rows
