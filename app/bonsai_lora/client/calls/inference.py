"""The Open Inference Protocol v2: a set is a model, its version the model's version."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bonsai_lora.client.answers import (
    IndexEntry,
    Inferred,
    ModelMetadata,
    RegionInfo,
    Row,
    ServerMetadata,
)
from bonsai_lora.client.call import Call, decode_field, decode_nothing, json_body, path_of

if TYPE_CHECKING:
    import numpy.typing as npt


def _model(model: str, version: int | str | None, *ending: str) -> str:
    versions = () if version is None else ("versions", str(version))
    return path_of("v2", "models", model, *versions, *ending)


def infer(
    model: str,
    inputs: "Mapping[str, npt.ArrayLike]",
    *,
    outputs: Sequence[str] | None = None,
    version: int | str | None = None,
    sets: Sequence[Row] | None = None,
    scale: float = 1.0,
    request_id: str = "",
) -> Call[Inferred]:
    """Return what a model makes of `inputs`, in binary.

    An input named like a module feeds that module; `x` feeds all `outputs`, and
    `experts` is the number of each row's expert, for fused experts only. The model `mixed`
    takes `sets`: what each row goes through, as in `apply_mixed`. Raises NotFoundError for
    an unknown model or version, InvalidError for wrong inputs: this protocol's errors have no code.
    """
    from bonsai_lora.client import tensors  # noqa: PLC0415 - loads NumPy

    return Call(
        method="POST",
        path=_model(model, version, "infer"),
        decode=tensors.decode_inferred,
        is_pure=True,
        **tensors.inference_body(inputs, outputs, sets, scale, request_id),
    )


def get_server() -> Call[ServerMetadata]:
    """Return the server's name, version and extensions."""
    return Call(path="/v2")


def get_server_live() -> Call[dict[str, bool]]:
    """Return that the server is alive."""
    return Call(path="/v2/health/live")


def get_server_ready() -> Call[dict[str, bool]]:
    """Return that the server is ready."""
    return Call(path="/v2/health/ready")


def get_model(model: str, *, version: int | str | None = None) -> Call[ModelMetadata]:
    """Return the inputs and outputs of a model; raises NotFoundError."""
    return Call(path=_model(model, version))


def get_model_ready(model: str, *, version: int | str | None = None) -> Call[dict[str, Any]]:
    """Return that a model is ready; raises NotFoundError."""
    return Call(path=_model(model, version, "ready"))


def get_model_config(model: str, *, version: int | str | None = None) -> Call[dict[str, Any]]:
    """Return a model's configuration in the fields of Triton; raises NotFoundError."""
    return Call(path=_model(model, version, "config"))


def get_model_statistics(
    model: str | None = None, *, version: int | str | None = None
) -> Call[list[dict[str, Any]]]:
    """Return Triton's statistics of one model or of all: counts, and sums of nanoseconds."""
    return Call(
        path="/v2/models/stats" if model is None else _model(model, version, "stats"),
        decode=decode_field("model_stats"),
    )


def list_models() -> Call[list[IndexEntry]]:
    """Return the repository index: every set, and the model `mixed`."""
    return Call(method="POST", path="/v2/repository/index", is_pure=True, **json_body({}))


def load_model(model: str) -> Call[None]:
    """Load a set into memory; raises NotFoundError."""
    return Call(
        method="POST",
        path=path_of("v2", "repository", "models", model, "load"),
        decode=decode_nothing,
        is_pure=True,
    )


def unload_model(model: str) -> Call[None]:
    """Release the memory of a set, which stays stored; raises NotFoundError."""
    return Call(
        method="POST",
        path=path_of("v2", "repository", "models", model, "unload"),
        decode=decode_nothing,
        is_pure=True,
    )


def list_regions(region: str | None = None) -> Call[list[RegionInfo]]:
    """Return the registered shared-memory regions, or the one of this name."""
    place = () if region is None else ("region", region)
    return Call(path=path_of("v2", "systemsharedmemory", *place, "status"))


def register_region(region: str, key: str, byte_size: int, *, offset: int = 0) -> Call[None]:
    """Register shared memory of this machine; raises UnsupportedFeatureError if that is off."""
    return Call(
        method="POST",
        path=path_of("v2", "systemsharedmemory", "region", region, "register"),
        decode=decode_nothing,
        **json_body({"key": key, "offset": offset, "byte_size": byte_size}),
    )


def unregister_regions(region: str | None = None) -> Call[None]:
    """Unregister one shared-memory region, or all; the memory itself stays."""
    place = () if region is None else ("region", region)
    return Call(
        method="POST",
        path=path_of("v2", "systemsharedmemory", *place, "unregister"),
        decode=decode_nothing,
    )
