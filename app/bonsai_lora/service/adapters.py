"""Change the adapters of a set, by module."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from bonsai_lora.core.adapter import LoraAdapter, check_factors
from bonsai_lora.core.cast import Array, all_finite
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.registry import adapter_bytes
from bonsai_lora.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidRequestError,
    UnsupportedAdapterError,
)
from bonsai_lora.formats.names import check_module_name
from bonsai_lora.service.budget import Budget, Reservation
from bonsai_lora.service.retry import repeated
from bonsai_lora.service.sets import Precondition
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.setfile import StoredSet


def get_adapter(stored: StoredSet, module: str) -> LoraAdapter:
    """Return the adapter of `module`; raises AdapterNotFoundError."""
    registry = stored.lora_set.registry
    adapter = registry.get(module)
    if adapter is None:
        raise AdapterNotFoundError(module, stored.record.name, registry.module_names())
    return adapter


def put_new_adapter(
    store: SetView,
    memory: Budget,
    name: str,
    module: str,
    d_in: int,
    d_out: int,
    config: LoraConfig | None,
    precondition: Precondition,
) -> tuple[StoredSet, bool]:
    """Set a newly initialized adapter for `module`; return the set and whether it is new."""

    def make(present: StoredSet) -> LoraAdapter:
        own = config if config is not None else present.record.config
        store.limits.check_rank(own.rank)
        needed = adapter_bytes(d_in, d_out, own.rank)
        store.check_budget(name, needed)
        reserved.add(needed)
        return LoraAdapter.new(d_in, d_out, own)

    with Reservation(memory) as reserved:
        return _put_adapter(store, name, module, make, precondition, initialized=True)


def put_weights(
    store: SetView,
    name: str,
    module: str,
    tensors: Mapping[str, Array],
    alpha: float | None,
    precondition: Precondition,
) -> tuple[StoredSet, bool]:
    """Set lora_A (r, d_in) and lora_B (d_out, r) of `module`; return the set and whether it is new.

    `alpha` defaults to the set's. Raises InvalidRequestError for other tensors, ShapeMismatchError
    if the ranks differ, InvalidAdapterError for NaN, infinity or float64.
    """
    a_matrix, b_matrix = _check_factors(tensors)
    rank = len(a_matrix)
    store.limits.check_rank(rank)

    def make(present: StoredSet) -> LoraAdapter:
        base = present.record.config
        own = replace(base, rank=rank, alpha=base.alpha if alpha is None else alpha)
        return LoraAdapter(own, a_matrix, b_matrix, own.scaling)

    return _put_adapter(store, name, module, make, precondition, initialized=False)


@repeated
def delete_adapter(store: SetView, name: str, module: str, precondition: Precondition) -> None:
    """Remove the adapter of `module` from a set, and the bias that it replaces."""
    with store.lock(name):
        present = store.read(name)
        precondition(present.record)
        get_adapter(present, module)
        lora_set = present.lora_set
        kept = {
            one: array for one, array in lora_set.replacements.items() if one != f"{module}.bias"
        }
        wanted = NextVersion(
            lora_set=replace(
                lora_set, registry=lora_set.registry.remove(module), replacements=kept
            ),
            origin=present.record.origin,
            previous=present.record,
            # peft loads a targeted module without tensors as an adapter that changes nothing.
            adapter_config=present.adapter_config,
        )
        store.write(wanted)


def _refuse_beside_variants(present: StoredSet) -> None:
    """Raise if the set has a kind of adapter that PEFT configures only for a whole set."""
    lora_set = present.lora_set
    adapters = lora_set.registry.adapters.values()
    if lora_set.replacements or any(
        one.bias is not None
        or one.magnitude is not None
        or one.layer != "linear"
        or one.experts is not None
        for one in adapters
    ):
        raise UnsupportedAdapterError(
            f"set {present.record.name!r} has DoRA, biases, embeddings or replaced modules, which "
            "PEFT configures only for a whole set; upload the whole set again",
            set=present.record.name,
        )


@repeated
def _put_adapter(
    store: SetView,
    name: str,
    module: str,
    make: Callable[[StoredSet], LoraAdapter],
    precondition: Precondition,
    *,
    initialized: bool,
) -> tuple[StoredSet, bool]:
    check_module_name(module)
    with store.lock(name):
        present = store.read(name)
        precondition(present.record)
        _refuse_beside_variants(present)
        registry = present.lora_set.registry
        changed = registry.add(module, make(present))
        store.limits.check_modules(len(changed.adapters))
        unmixed = initialized and present.record.origin == "initialized"
        wanted = NextVersion(
            lora_set=present.lora_set.with_registry(changed),
            origin="initialized" if unmixed else "mixed",
            previous=present.record,
        )
        return store.write(wanted), registry.get(module) is None


def _check_factors(tensors: Mapping[str, Array]) -> tuple[Array, Array]:
    if tensors.keys() != {"lora_A", "lora_B"}:
        raise InvalidRequestError(
            f"the body has the tensors {sorted(tensors)[:8]}; expected lora_A and lora_B",
            got=sorted(tensors)[:8],
            expected=["lora_A", "lora_B"],
        )
    a_matrix, b_matrix = tensors["lora_A"], tensors["lora_B"]
    for name, matrix in tensors.items():
        if matrix.dtype.itemsize == 8:
            raise InvalidAdapterError(f"{name} is F64; expected F32, F16 or BF16", field=name)
        if not all_finite(matrix):
            raise InvalidAdapterError(
                f"{name} has NaN or infinity; expected finite numbers", field=name
            )
    check_factors(a_matrix, b_matrix)
    return a_matrix, b_matrix
