"""The adapters of a set: list, show, put, delete."""

from typing import TYPE_CHECKING

from bonsai_lora.client.answers import Config, ModuleInfo
from bonsai_lora.client.call import (
    Call,
    decode_field,
    decode_nothing,
    given,
    header_lines,
    json_body,
    path_of,
    query_of,
)

if TYPE_CHECKING:
    import numpy.typing as npt


def _path(set_name: str, module: str) -> str:
    return path_of("v1", "sets", set_name, "adapters", module)


def list_adapters(set_name: str, *, version: int | None = None) -> Call[list[ModuleInfo]]:
    """Return the adapters of a set in the order in which they were added."""
    return Call(
        path=path_of("v1", "sets", set_name, "adapters"),
        query=query_of(version=version),
        decode=decode_field("adapters"),
    )


def get_adapter(set_name: str, module: str, *, version: int | None = None) -> Call[ModuleInfo]:
    """Return one adapter of a set; raises SetNotFoundError, AdapterNotFoundError."""
    return Call(path=_path(set_name, module), query=query_of(version=version))


def put_adapter(
    set_name: str,
    module: str,
    d_in: int,
    d_out: int,
    *,
    config: Config | None = None,
    if_match: str | None = None,
) -> Call[ModuleInfo]:
    """Add or replace one adapter, initialized as the reference does it: A at random, B zero.

    `config` is by default that of the set.
    """
    body = json_body(given(d_in=d_in, d_out=d_out, config=config), if_match=if_match)
    return Call(method="PUT", path=_path(set_name, module), **body)


def put_weights(
    set_name: str,
    module: str,
    lora_a: "npt.ArrayLike",
    lora_b: "npt.ArrayLike",
    *,
    alpha: float | None = None,
    if_match: str | None = None,
) -> Call[ModuleInfo]:
    """Add or replace one adapter: A is (r, d_in), B is (d_out, r).

    float16 and bfloat16 are kept, anything else becomes float32. `alpha` is by default that of the
    set. Raises ShapeMismatchError if A and B do not fit.
    """
    from bonsai_lora.client.tensors import binary_body  # noqa: PLC0415 - loads NumPy

    body = binary_body({"lora_A": lora_a, "lora_B": lora_b})
    body["headers"] |= header_lines(if_match=if_match)
    return Call(method="PUT", path=_path(set_name, module), query=query_of(alpha=alpha), **body)


def delete_adapter(set_name: str, module: str, *, if_match: str | None = None) -> Call[None]:
    """Delete one adapter of a set; raises SetNotFoundError, AdapterNotFoundError."""
    return Call(
        method="DELETE",
        path=_path(set_name, module),
        headers=header_lines(if_match=if_match),
        decode=decode_nothing,
    )
