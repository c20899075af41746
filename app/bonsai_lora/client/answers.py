"""What the service answers: typed dictionaries for JSON, dataclasses for arrays.

A newer service may add keys; those are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

Dtype = Literal["F32", "F16", "BF16"]

ExpertLayout = Literal["rank_major", "grouped_by_expert"]
"""The order of B's columns for fused experts."""

Weights = Mapping[str, float]
"""Names of sets and their weights."""

Row = str | Weights | None
"""What a row of a mixed batch goes through: one set, several with weights, or none."""


class Config(TypedDict, total=False):
    """Hyper-parameters of new adapters; the reference's defaults apply to absent keys."""

    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]


class Attention(TypedDict):
    """Widths of q_proj, k_proj, v_proj and o_proj."""

    hidden_size: int
    num_heads: int
    num_kv_heads: NotRequired[int]
    head_dim: NotRequired[int]


class Mlp(TypedDict):
    """Widths of gate_proj, up_proj and down_proj."""

    hidden_size: int
    intermediate_size: int


class ModuleInfo(TypedDict):
    """One adapter of a set."""

    name: str
    d_in: int
    d_out: int
    rank: int
    alpha: float
    scaling: float
    param_count: int
    memory_bytes: int
    experts: int | None


class SetSummary(TypedDict):
    """A set without its modules."""

    name: str
    base_model_name: str
    version: int
    created_at: str
    updated_at: str
    origin: str
    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    rank: int


class SetPage(TypedDict):
    """A page of sets by name."""

    sets: list[SetSummary]
    next_cursor: str | None
    as_of: NotRequired[str]


class SetInfo(SetSummary):
    """Everything about a set but its weights, and the ETag of this version for `if_match`."""

    config: Config
    modules: list[ModuleInfo]
    etag: str


class ImportedModule(ModuleInfo):
    """One adapter of an upload; `delta_norm` is the Frobenius norm of scaling · B·A."""

    delta_norm: float


class ImportReport(SetSummary):
    """What an upload became."""

    config: Config
    modules: list[ImportedModule]
    ignored_keys: list[str]
    warnings: list[str]
    etag: str


class ModuleStats(TypedDict):
    """One module in numbers."""

    name: str
    param_count: int
    memory_bytes: int
    rank: int
    scaling: float
    delta_norm: float
    effective_rank: float


class SetStats(TypedDict):
    """One set in numbers."""

    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    base_param_count: int | None
    efficiency_ratio: float | None
    modules: list[ModuleStats]


class StoreStats(TypedDict):
    """All sets in numbers; `sets` has the 100 largest."""

    set_count: int
    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    memory_budget_bytes: int
    resident_bytes: int
    uptime_seconds: float
    sets: list[SetSummary]
    as_of: NotRequired[str]


class Estimate(TypedDict):
    """How many adapters fit into a budget."""

    adapters: int
    bytes_per_adapter: int


class BaseFile(TypedDict):
    """A file of a base."""

    name: str
    size_bytes: int


class BaseInfo(TypedDict):
    """A base checkpoint; `dtypes` counts parameters, of a GGUF file tensors by type."""

    name: str
    format: str
    architecture: str
    files: list[BaseFile]
    ignored_files: list[str]
    dtypes: dict[str, int]
    parameter_count: int


class BaseList(TypedDict):
    """The base checkpoints; `bad` maps names of unusable folders and files to the reason."""

    bases: list[BaseInfo]
    bad: dict[str, str]


class MergedFile(TypedDict):
    """A file of a merged model."""

    name: str
    size_bytes: int
    etag: str


class Health(TypedDict):
    """The process answers."""

    status: str


class Readiness(TypedDict):
    """The store is loaded."""

    status: str
    sets: int
    bad_file_count: int
    newer_file_count: int
    not_imported_count: int
    bad_files: NotRequired[dict[str, str]]
    newer_files: NotRequired[list[str]]
    not_imported: NotRequired[dict[str, str]]
    store_writable: bool
    store: NotRequired[str]
    bases_readable: bool | None


class ServerMetadata(TypedDict):
    """The server in the words of the Open Inference Protocol."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """An input or output of a model; -1 in a shape stands for any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """A set as a model of the Open Inference Protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class IndexEntry(TypedDict):
    """A model of the repository."""

    name: str
    version: str
    state: str
    reason: str


class RegionInfo(TypedDict):
    """A registered shared-memory region."""

    name: str
    key: str
    offset: int
    byte_size: int


class PulledFile(TypedDict):
    """A downloaded file; `oid` is its tag."""

    path: str
    size: int
    oid: str


class PulledMerged(PulledFile):
    """A downloaded GGUF file of a merged model."""

    delta_gain: float | None
    """What its rounding left of the deltas, if the service knows it already."""


class Pulled(TypedDict):
    """A downloaded model: where it is, which commit of it, and its files."""

    folder: str
    commit: str
    files: list[PulledFile]
    delta_gain: float | None
    """Of a merged model: what its rounding left of the deltas, if the service knows it already."""


@dataclass(frozen=True, eq=False, slots=True)
class Applied:
    """What one module adds, and which versions of which sets computed it."""

    outputs: "Array"
    """(rows, d_out), or (d_out,) for one vector."""
    versions: Mapping[str, int]
    """By set."""


@dataclass(frozen=True, eq=False, slots=True)
class AppliedMany:
    """What several modules add, and which versions of which sets computed it."""

    outputs: "Mapping[str, Array]"
    """By module: (rows, d_out), or (d_out,) for one vector."""
    versions: Mapping[str, int]
    """By set."""


@dataclass(frozen=True, eq=False, slots=True)
class Inferred:
    """The answer of a model of the Open Inference Protocol."""

    model_name: str
    model_version: str
    outputs: "Mapping[str, Array]"
    """By name, float32."""
    id: str = ""
    """As in the request."""
