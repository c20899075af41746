"""The JSON of the HTTP API as pydantic models; their docstrings appear in OpenAPI."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, FiniteFloat

from bonsai_lora import errors
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig, shortest_float32
from bonsai_lora.core.shapes import MODELS, AttentionShape, MlpShape, Shapes, layered
from bonsai_lora.core.spectrum import delta_norm, effective_rank
from bonsai_lora.formats.names import RESERVED_SET_NAMES, SET_NAME_PATTERN
from bonsai_lora.service.sets import Imported
from bonsai_lora.storage.setfile import StoredSet

Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
Names = Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=1024), FailFast()]


class RequestModel(BaseModel):
    """Refuses unknown fields and implicit conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Config(RequestModel):
    """Hyperparameters of an adapter."""

    rank: Size = Field(8, description="r; with 0 the adapter changes nothing")
    alpha: FiniteFloat = Field(8.0, description="scaling is alpha / r")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="used in training only"
    )
    target_modules: Names = Field(
        list(LoraConfig().target_modules),
        description="modules to adapt, by full name or last component; an empty list means all",
    )

    def to_core(self) -> LoraConfig:
        """Return the core's configuration."""
        return LoraConfig(self.rank, self.alpha, self.dropout, tuple(self.target_modules))


class InfoModel(BaseModel):
    """May be read from the attributes of a core or service object with `model_validate`."""

    model_config = ConfigDict(from_attributes=True)


class ConfigInfo(InfoModel):
    """Hyperparameters of a set; an uploaded set may exceed the bounds of `Config`."""

    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]


class Attention(RequestModel):
    """Dimensions of q_proj, k_proj, v_proj and o_proj."""

    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size | None = Field(
        None, description="give this or head_dim to get Qwen3's grouped-query shapes"
    )
    head_dim: Size | None = None


class Mlp(RequestModel):
    """Dimensions of gate_proj, up_proj and down_proj."""

    hidden_size: Size
    intermediate_size: Size


class CreateSet(RequestModel):
    """A set to create; only the name is required."""

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
        description=f"matches {SET_NAME_PATTERN}; reserved: {', '.join(sorted(RESERVED_SET_NAMES))}"
    )
    base_model_name: str = Field("", max_length=256, description="model that the set adapts")
    config: Config = Field(default_factory=Config)
    model: str | None = Field(
        None,
        description="a known model, instead of attention, mlp and num_layers: " + ", ".join(MODELS),
    )
    attention: Attention | None = None
    mlp: Mlp | None = None
    num_layers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="create adapters for each layer, under full module names"
    )

    def shapes(self) -> tuple[Shapes, str]:
        """Return the requested shapes and the name of the base model.

        Fields given in addition to `model` override that part of it.
        """
        attention = AttentionShape(**self.attention.model_dump()) if self.attention else None
        mlp = MlpShape(**self.mlp.model_dump()) if self.mlp else None
        if self.model is not None:
            model = MODELS.get(self.model)
            if model is None:
                raise errors.InvalidRequestError(
                    f"model {self.model[:100]!r} is unknown; expected one of {', '.join(MODELS)}",
                    field="model",
                    expected=list(MODELS),
                )
            own = replace(
                model,
                attention=attention or model.attention,
                mlp=mlp or model.mlp,
                num_layers=self.num_layers or model.num_layers,
            )
            return own.modules(), self.base_model_name or self.model
        shapes = {**(attention.modules() if attention else {}), **(mlp.modules() if mlp else {})}
        if self.num_layers is None:
            return shapes, self.base_model_name
        if not shapes:
            raise errors.InvalidRequestError(
                "num_layers is given without attention or mlp; add the shapes of one layer",
                field="num_layers",
            )
        return layered(shapes, self.num_layers), self.base_model_name


class NewAdapter(RequestModel):
    """An adapter to initialize: A uniform, B zero."""

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
    experts: int | None = Field(
        None, description="number of fused experts; null for an ordinary module"
    )

    @classmethod
    def of(cls, name: str, adapter: LoraAdapter) -> "ModuleInfo":
        """Return the schema of an adapter."""
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


class SetSummary(InfoModel):
    """A set without its modules."""

    name: str
    base_model_name: str
    version: int = Field(description="1 at creation, incremented by each change")
    created_at: str = Field(description="RFC 3339, UTC")
    updated_at: str
    origin: Literal["initialized", "peft", "mlx", "gguf", "mixed", "combined", "extracted"]
    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    rank: int = Field(description="of the set's configuration; modules may have others")


class SetInfo(SetSummary):
    """A set with its modules, without its weights."""

    config: ConfigInfo
    modules: list[ModuleInfo]

    @classmethod
    def of(cls, stored: StoredSet) -> "SetInfo":
        """Return the schema of a set."""
        adapters = stored.lora_set.registry.adapters.items()
        return cls(
            **SetSummary.model_validate(stored.record).model_dump(),
            config=ConfigInfo.model_validate(stored.record.config),
            modules=[ModuleInfo.of(name, adapter) for name, adapter in adapters],
        )


class SetPage(BaseModel):
    """A page of sets, sorted by name."""

    sets: list[SetSummary]
    next_cursor: str | None = Field(
        description="pass it as `cursor` to get the next page; null on the last page"
    )
    as_of: str | None = Field(
        None,
        description="time of the index that was read (RFC 3339); absent if the page is current",
    )


class ImportedModule(ModuleInfo):
    """One imported adapter."""

    delta_norm: float = Field(description="Frobenius norm of scaling * B @ A")


class PullSet(RequestModel):
    """An adapter in an origin that the operator named."""

    source: str = Field(
        max_length=1024,
        description="ORIGIN:PATH, or ORIGIN:PATH@REVISION of a hub",
        examples=["hub:acme/sql-lora@main"],
    )


class PatchSet(RequestModel):
    """What can be changed of a set without its weights."""

    base_model_name: str = Field(max_length=1024, description="the model that the set is for")


class ImportReport(SetSummary):
    """The set that an upload created."""

    config: ConfigInfo
    modules: list[ImportedModule]
    ignored_keys: list[str] = Field(description="tensors that were not imported, by design")
    warnings: list[str]

    @classmethod
    def of(cls, imported: Imported) -> "ImportReport":
        """Return the report of an import."""
        info, norms = SetInfo.of(imported.stored), imported.delta_norms
        modules = [ImportedModule(**dict(one), delta_norm=norms[one.name]) for one in info.modules]
        return cls(
            **(dict(info) | {"modules": modules}),
            ignored_keys=imported.ignored_keys,
            warnings=imported.warnings,
        )


class AdapterList(BaseModel):
    """The adapters of a set."""

    adapters: list[ModuleInfo]


class ModuleStatsInfo(BaseModel):
    """Statistics of one module."""

    name: str
    param_count: int
    memory_bytes: int
    rank: int
    scaling: float
    delta_norm: float = Field(description="Frobenius norm of scaling * B @ A")
    effective_rank: float = Field(
        description="exp of the entropy of the normalized singular values (Roy and Vetterli 2007)"
    )

    @classmethod
    def of(cls, name: str, adapter: LoraAdapter) -> "ModuleStatsInfo":
        """Compute the statistics of an adapter."""
        return cls(
            name=name,
            param_count=adapter.param_count(),
            memory_bytes=adapter.memory_bytes(),
            rank=adapter.rank,
            scaling=shortest_float32(adapter.scaling),
            delta_norm=delta_norm(adapter),
            effective_rank=effective_rank(adapter),
        )


class SetStats(BaseModel):
    """Statistics of one set."""

    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    base_param_count: int | None
    efficiency_ratio: float | None = Field(
        description="LoRA parameters / base_param_count; 0.0 if that is 0, null if it is not given"
    )
    modules: list[ModuleStatsInfo]


class StoreStatsInfo(BaseModel):
    """Statistics of the whole store."""

    set_count: int
    adapter_count: int
    total_trainable_params: int
    total_memory_bytes: int
    memory_budget_bytes: int
    resident_bytes: int
    uptime_seconds: float
    sets: list[SetSummary] = Field(description="largest first, at most 100")
    as_of: str | None = Field(
        None,
        description="time of the index that `sets` are of (RFC 3339); absent if they are current",
    )


class Estimate(BaseModel):
    """How many adapters fit in a memory budget."""

    adapters: int
    bytes_per_adapter: int


class Problem(BaseModel):
    """An error (RFC 9457); additional fields carry the values that it is about."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str = Field(description="for people: what is wrong, and what to do")
    instance: str = Field(description="path of the request")
    code: str = Field(
        description="stable, for programs; later releases add codes, so treat an unknown one by "
        "its status"
    )
    request_id: str | None = None
    trace_id: str | None = Field(
        None, description="trace id of the request's `traceparent`, if any"
    )
