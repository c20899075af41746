"""The Open Inference Protocol v2: a set is a model, its version the model's version."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from bonsai_lora.client.answers import (
    IndexEntry,
    Inferred,
    ModelMetadata,
    RegionInfo,
    Row,
    ServerMetadata,
)
from bonsai_lora.client.call import Call, decode_json, decode_nothing, json_body, path_of

if TYPE_CHECKING:
    import numpy.typing as npt


def _model(model: str, version: int | str | None, *ending: str) -> str:
    versions = () if version is None else ("versions", str(version))
    return "/v2" + path_of("models", model, *versions, *ending)


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
    return Call(method="GET", path="/v2", decode=decode_json, is_pure=True)


def get_server_live() -> Call[dict[str, bool]]:
    """Return that the server is alive."""
    return Call(method="GET", path="/v2/health/live", decode=decode_json, is_pure=True)


def get_server_ready() -> Call[dict[str, bool]]:
    """Return that the server is ready."""
    return Call(method="GET", path="/v2/health/ready", decode=decode_json, is_pure=True)


def get_model(model: str, *, version: int | str | None = None) -> Call[ModelMetadata]:
    """Return the inputs and outputs of a model; raises NotFoundError."""
    return Call(method="GET", path=_model(model, version), decode=decode_json, is_pure=True)


def get_model_ready(model: str, *, version: int | str | None = None) -> Call[dict[str, Any]]:
    """Return that a model is ready; raises NotFoundError."""
    path = _model(model, version, "ready")
    return Call(method="GET", path=path, decode=decode_json, is_pure=True)


def get_model_config(model: str, *, version: int | str | None = None) -> Call[dict[str, Any]]:
    """Return a model's configuration in the fields of Triton; raises NotFoundError."""
    path = _model(model, version, "config")
    return Call(method="GET", path=path, decode=decode_json, is_pure=True)


def get_model_statistics(
    model: str | None = None, *, version: int | str | None = None
) -> Call[list[dict[str, Any]]]:
    """Return Triton's statistics of one model or of all: counts, and sums of nanoseconds."""

    def decode(answer: httpx.Response) -> list[dict[str, Any]]:
        statistics: list[dict[str, Any]] = decode_json(answer)["model_stats"]
        return statistics

    path = "/v2/models/stats" if model is None else _model(model, version, "stats")
    return Call(method="GET", path=path, decode=decode, is_pure=True)


def list_models() -> Call[list[IndexEntry]]:
    """Return the repository index: every set, and the model `mixed`."""
    return Call(
        method="POST",
        path="/v2/repository/index",
        decode=decode_json,
        is_pure=True,
        **json_body({}),
    )


def load_model(model: str) -> Call[None]:
    """Bring a set into memory; raises NotFoundError."""
    path = "/v2/repository" + path_of("models", model, "load")
    return Call(method="POST", path=path, decode=decode_nothing, is_pure=True)


def unload_model(model: str) -> Call[None]:
    """Release the memory of a set, which stays stored; raises NotFoundError."""
    path = "/v2/repository" + path_of("models", model, "unload")
    return Call(method="POST", path=path, decode=decode_nothing, is_pure=True)


def list_regions(region: str | None = None) -> Call[list[RegionInfo]]:
    """Return the registered shared-memory regions, or the one of this name."""
    place = () if region is None else ("region", region)
    path = "/v2" + path_of("systemsharedmemory", *place, "status")
    return Call(method="GET", path=path, decode=decode_json, is_pure=True)


def register_region(region: str, key: str, byte_size: int, *, offset: int = 0) -> Call[None]:
    """Give shared memory of this machine a name; raises UnsupportedFeatureError if it is off."""
    return Call(
        method="POST",
        path="/v2" + path_of("systemsharedmemory", "region", region, "register"),
        decode=decode_nothing,
        **json_body({"key": key, "offset": offset, "byte_size": byte_size}),
    )


def unregister_regions(region: str | None = None) -> Call[None]:
    """Forget one shared-memory region, or all; the memory itself stays."""
    place = () if region is None else ("region", region)
    path = "/v2" + path_of("systemsharedmemory", *place, "unregister")
    return Call(method="POST", path=path, decode=decode_nothing)
