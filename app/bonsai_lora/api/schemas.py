"""The JSON of the contract, as pydantic models; OpenAPI shows what stands here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, FiniteFloat

from bonsai_lora.core import shapes
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig, shortest_float32
from bonsai_lora.formats.names import SET_NAME_PATTERN
from bonsai_lora.service.sets import Imported
from bonsai_lora.service.stats import ModuleStats
from bonsai_lora.storage.setfile import SetRecord, StoredSet
from bonsai_lora.wire.stacks import MAX_SCALE, MAX_STACK

Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
Names = Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=1024), FailFast()]
Rows = list[list[float]]
Vectors = Rows | list[float]


class RequestModel(BaseModel):
    """Unknown fields and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Config(RequestModel):
    """Hyper-parameters of an adapter."""

    rank: Size = Field(8, description="r; 0 makes adapters that change nothing")
    alpha: FiniteFloat = Field(8.0, description="the scaling is alpha / r")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="used in training only"
    )
    target_modules: Names = Field(
        list(LoraConfig().target_modules),
        description="modules to keep, by full name or last part; an empty list keeps all",
    )

    def to_core(self) -> LoraConfig:
        """Return the core's configuration."""
        return LoraConfig(self.rank, self.alpha, self.dropout, tuple(self.target_modules))


class ConfigInfo(BaseModel):
    """Hyper-parameters of a set; an upload's may be beyond what can be asked for here."""

    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]

    @classmethod
    def of(cls, config: LoraConfig) -> "ConfigInfo":
        """Return the answer's form of a configuration."""
        return cls(**config.to_dict())


class Attention(RequestModel):
    """Widths of q_proj, k_proj, v_proj and o_proj."""

    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size | None = Field(
        None, description="with this or head_dim the real Qwen3 shapes are made"
    )
    head_dim: Size | None = None


class Mlp(RequestModel):
    """Widths of gate_proj, up_proj and down_proj."""

    hidden_size: Size
    intermediate_size: Size


class CreateSet(RequestModel):
    """A new set; only the name is required."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "my-adapter",
                    "base_model_name": "bonsai-8b",
                    "config": {"rank": 8, "alpha": 16.0},
                    "attention": {
                        "hidden_size": 256,
                        "num_heads": 8,
                        "num_kv_heads": 2,
                        "head_dim": 32,
                    },
                    "mlp": {"hidden_size": 256, "intermediate_size": 512},
                    "num_layers": 2,
                },
                {"name": "ready-made", "model": "qwen3-0.6b"},
            ]
        }
    )

    name: str = Field(
        description=f"matches {SET_NAME_PATTERN}; adapters, api, mixed, v1, v2 are reserved"
    )
    base_model_name: str = Field("", max_length=256, description="the model that the set is for")
    config: Config = Field(default_factory=Config)
    model: str | None = Field(
        None,
        description="a known model in place of attention, mlp and num_layers: "
        + ", ".join(shapes.MODELS),
    )
    attention: Attention | None = None
    mlp: Mlp | None = None
    num_layers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="one adapter per layer, under full module names"
    )


class NewAdapter(RequestModel):
    """An adapter to initialise as the reference does."""

    d_in: Size
    d_out: Size
    config: Config | None = Field(None, description="default: the set's")


class ModuleInfo(BaseModel):
    """One adapter of a set."""

    name: str
    d_in: int
    d_out: int
    rank: int
    alpha: float
    scaling: float
    param_count: int
    memory_bytes: int = Field(description="both matrices as float32")
    experts: int | None = Field(None, description="how many, where it is for fused experts")

    @classmethod
    def of(cls, name: str, adapter: LoraAdapter) -> "ModuleInfo":
        """Return the answer's form of an adapter."""
        return cls(
            name=name,
            d_in=adapter.d_in,
            d_out=adapter.d_out,
            rank=adapter.rank,
            alpha=adapter.config.alpha,
            scaling=shortest_float32(adapter.scaling),
            param_count=adapter.param_count(),
            memory_bytes=adapter.memory_bytes(),
            experts=adapter.experts,
        )


class SetSummary(BaseModel):
    """A set without its modules."""

    name: str
    base_model_name: str
    version: int = Field(description="1 at creation, one more with each change")
    created_at: str = Field(description="RFC 3339, UTC")
    updated_at: str
    origin: Literal["initialized", "peft", "mlx", "gguf", "mixed"]
    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int

    @staticmethod
    def fields_of(record: SetRecord) -> dict[str, Any]:
        """Return the fields that a record gives."""
        return {
            "name": record.name,
            "base_model_name": record.base_model_name,
            "version": record.version,
            "created_at": record.created_at,
            "updated_at": record.updated_at,
            "origin": record.origin,
            "adapter_count": record.adapter_count,
            "total_trainable_params": record.total_trainable_params,
            "total_memory_bytes": record.total_memory_bytes,
        }


class SetInfo(SetSummary):
    """Everything about a set but its weights."""

    config: ConfigInfo
    modules: list[ModuleInfo]

    @staticmethod
    def fields_of_set(stored: StoredSet) -> dict[str, Any]:
        """Return the fields that a stored set gives."""
        adapters = stored.lora_set.registry.adapters.items()
        return {
            **SetSummary.fields_of(stored.record),
            "config": ConfigInfo.of(stored.record.config),
            "modules": [ModuleInfo.of(name, adapter) for name, adapter in adapters],
        }


class SetPage(BaseModel):
    """A page of sets by name."""

    sets: list[SetSummary]
    next_cursor: str | None = Field(description="give it as `cursor` for the next page; null: last")


class ImportedModule(ModuleInfo):
    """One adapter of an upload."""

    delta_norm: float = Field(description="Frobenius norm of scaling * B @ A")


class PatchSet(RequestModel):
    """What can be changed of a set without its weights."""

    base_model_name: str = Field(max_length=1024, description="the model that the set is for")


class ImportReport(SetSummary):
    """What an upload became."""

    config: ConfigInfo
    modules: list[ImportedModule]
    ignored_keys: list[str] = Field(description="tensors that were left out on purpose")
    warnings: list[str]

    @classmethod
    def of(cls, imported: Imported) -> "ImportReport":
        """Return the report of an import."""
        stored, norms = imported.stored, imported.delta_norms
        modules = [
            ImportedModule(**ModuleInfo.of(name, one).model_dump(), delta_norm=norms[name])
            for name, one in stored.lora_set.registry.adapters.items()
        ]
        return cls(
            **SetSummary.fields_of(stored.record),
            config=ConfigInfo.of(stored.record.config),
            modules=modules,
            ignored_keys=imported.ignored_keys,
            warnings=imported.warnings,
        )


class AdapterList(BaseModel):
    """The adapters of a set."""

    adapters: list[ModuleInfo]


class SetWeights(RequestModel):
    """The two matrices of an adapter."""

    lora_A: Rows = Field(description="(r, d_in)")  # noqa: N815 - the contract's name
    lora_B: Rows = Field(description="(d_out, r)")  # noqa: N815 - the contract's name
    alpha: FiniteFloat | None = Field(None, description="default: the set's")


class WeightedSet(RequestModel):
    """A set with the factor on what it adds."""

    set: str
    weight: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


Stack = Annotated[list[WeightedSet | str], Field(max_length=MAX_STACK)]
Stacked = Annotated[
    Stack | None, Field(description="further sets whose deltas are added, each with its weight")
]


Experts = Annotated[
    list[int] | None,
    Field(description="for fused experts only: the number of the expert of each row, from 0"),
]


class ApplyRequest(RequestModel):
    """Vectors for one module."""

    inputs: Vectors = Field(description="a list of vectors (rows, d_in), or one vector (d_in,)")
    base_outputs: Vectors | None = Field(
        None, description="W·x without bias, for DoRA modules only: (rows, d_out) or (d_out,)"
    )
    sets: Stacked = None
    experts: Experts = None


class ApplyAnswer(BaseModel):
    """What the adapter adds; all from one version of the set."""

    set: str
    module: str
    version: int
    versions: dict[str, int] | None = Field(
        None, description="by set, where `sets` stacked several"
    )
    outputs: Vectors


class ApplyManyRequest(RequestModel):
    """Vectors by module, or one batch for every `module` parameter."""

    inputs: dict[str, Vectors] | Vectors
    sets: Stacked = None
    base_outputs: dict[str, Vectors] | None = Field(
        None, description="W·x without bias, for DoRA modules only"
    )
    experts: Experts = None


class ApplyManyAnswer(BaseModel):
    """What each adapter adds."""

    set: str
    version: int
    versions: dict[str, int] | None = Field(
        None, description="by set, where `sets` stacked several"
    )
    outputs: dict[str, Vectors]


class ApplyMixedRequest(RequestModel):
    """Vectors for one module, each row through its own sets."""

    module: str
    sets: list[str | WeightedSet | Stack | None] = Field(
        description="one entry per row: a set's name, null for none, or sets with weights"
    )
    inputs: Vectors = Field(description="(rows, d_in), or one vector (d_in,)")
    base_outputs: Vectors | None = Field(
        None, description="W·x without bias, for DoRA sets only: (rows, d_out) or (d_out,)"
    )
    experts: Experts = None


class ApplyMixedAnswer(BaseModel):
    """What the sets add, in the order of the rows."""

    module: str
    versions: dict[str, int] = Field(description="the version with which each set took part")
    outputs: Vectors


class MergeRequest(RequestModel):
    """A small weight matrix (d_out, d_in)."""

    weights: Rows


class MergeAnswer(BaseModel):
    """W + scaling * B @ A."""

    set: str
    module: str
    version: int
    weights: Rows


class ModuleStatsInfo(BaseModel):
    """One module in numbers."""

    name: str
    param_count: int
    memory_bytes: int
    rank: int
    scaling: float
    delta_norm: float = Field(description="Frobenius norm of scaling * B @ A")
    effective_rank: float = Field(
        description="exp of the entropy of the normalised singular values (Roy and Vetterli 2007)"
    )

    @classmethod
    def of(cls, stats: ModuleStats) -> "ModuleStatsInfo":
        """Return the answer's form."""
        return cls(
            name=stats.name,
            param_count=stats.adapter.param_count(),
            memory_bytes=stats.adapter.memory_bytes(),
            rank=stats.adapter.rank,
            scaling=shortest_float32(stats.adapter.scaling),
            delta_norm=stats.delta_norm,
            effective_rank=stats.effective_rank,
        )


class SetStats(BaseModel):
    """One set in numbers."""

    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    base_param_count: int | None
    efficiency_ratio: float | None = Field(
        description="LoRA over base parameters; 0.0 for a count of 0, null where none is given"
    )
    modules: list[ModuleStatsInfo]


class StoreStatsInfo(BaseModel):
    """The whole registry in numbers."""

    set_count: int
    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    memory_budget_bytes: int
    resident_bytes: int
    uptime_seconds: float
    sets: list[SetSummary] = Field(description="largest first, at most 100")


class Estimate(BaseModel):
    """How many adapters fit."""

    adapters: int
    bytes_per_adapter: int


class BaseFile(BaseModel):
    """A file of a base."""

    name: str
    size_bytes: int


class BaseInfo(BaseModel):
    """A base checkpoint."""

    name: str
    files: list[BaseFile]
    dtypes: dict[str, int] = Field(description="parameters by dtype")
    parameter_count: int
    ignored_files: list[str] = Field(
        description="files and folders beside them that are no part of the model"
    )


class BaseList(BaseModel):
    """The base checkpoints."""

    bases: list[BaseInfo]
    bad: dict[str, str] = Field(description="name -> reason, of folders that are no checkpoint")


class MergedFileInfo(BaseModel):
    """A file of a merged model."""

    name: str
    size_bytes: int
    etag: str


class MergedFiles(BaseModel):
    """The files of a merged model."""

    files: list[MergedFileInfo]


class Health(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """The store is loaded."""

    status: Literal["ready"] = "ready"
    sets: int
    bad_files: dict[str, str] = Field(
        description="name -> reason, of files that were set aside since the start"
    )


class Problem(BaseModel):
    """A refusal (RFC 9457); further fields carry the values that it is about."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str = Field(description="for a person: what is wrong, what was expected, what to do")
    instance: str
    code: str = Field(description="stable; the README lists all")
    request_id: str | None = None
