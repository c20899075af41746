"""Create, import, change, list, export and delete sets."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from bonsai_lora.core.adapter import LoraAdapter, check_factors
from bonsai_lora.core.cast import Array, all_finite
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import adapter_bytes
from bonsai_lora.core.shapes import Shapes
from bonsai_lora.core.spectrum import delta_norm
from bonsai_lora.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidRequestError,
    SetExistsError,
    SetNotFoundError,
    UnsupportedAdapterError,
)
from bonsai_lora.formats import mlx, peft
from bonsai_lora.formats.experts import ExpertLayout
from bonsai_lora.formats.names import check_module_name, check_set_name
from bonsai_lora.formats.peft_config import PeftConfig, parse_config
from bonsai_lora.service.budget import Budget, Reservation
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.setfile import SetRecord, StoredSet
from bonsai_lora.storage.upload import ReceivedUpload, Upload

Precondition = Callable[[SetRecord | None], None]
"""Called with the current record (None: no such set); raises PreconditionFailedError."""


_BASE_FIELD = "base_model_name_or_path"


@dataclass(frozen=True, slots=True)
class Imported:
    """A set made from an upload, and the report of the import."""

    stored: StoredSet
    created: bool
    ignored_keys: list[str]
    warnings: list[str]
    delta_norms: Mapping[str, float]


def create_set(
    store: SetView,
    limits: Limits,
    memory: Budget,
    name: str,
    base_model_name: str,
    config: LoraConfig,
    shapes: Shapes,
) -> StoredSet:
    """Create a set with newly initialized adapters for those `shapes` that `config` targets.

    Raises SetExistsError, InvalidNameError, RankTooLargeError, TooManyModulesError,
    MemoryBudgetError, BusyError, and InvalidRequestError if target_modules matches none of the
    shapes.
    """
    check_set_name(name)
    limits.check_rank(config.rank)
    kept = {module: shape for module, shape in shapes.items() if config.targets(module)}
    limits.check_modules(len(kept))
    if shapes and not kept:
        raise InvalidRequestError(
            f"target_modules {list(config.target_modules)} matches none of the modules "
            f"{list(shapes)[:8]}; name some of them, or send an empty list for all",
            field="target_modules",
        )
    with store.lock(name):
        refuse_existing(store, name)
        needed = sum(adapter_bytes(*shape, config.rank) for shape in kept.values())
        limits.check_budget(store, name, needed)
        with Reservation(memory) as reserved:
            reserved.add(needed)
            lora_set = BonsaiLoraSet.new(config, base_model_name, name).add_adapters(kept)
            return _write(store, limits, lora_set, origin="initialized", previous=None)


def import_adapter(
    store: SetView,
    limits: Limits,
    name: str,
    raw_config: bytes,
    upload: Upload,
    precondition: Precondition,
    *,
    base_model_name: str | None = None,
    expert_layout: ExpertLayout | None = None,
) -> Imported:
    """Create or replace a set from a PEFT or MLX adapter: its configuration and safetensors file.

    `base_model_name` replaces the name in the configuration; `expert_layout` overrides the column
    order of B for fused experts. Raises the errors of `peft.decode_adapter`, `mlx.decode_mlx`,
    `Upload.finish` and `store_import`, and InvalidNameError, and then changes nothing.
    """
    check_set_name(name)
    raw = parse_config(raw_config)
    limits.check_tensors(upload.count_tensors())
    received = upload.finish()
    tensors: Mapping[str, Array] = received.tensors
    is_mlx = mlx.is_mlx(raw, tensors)
    if is_mlx:
        raw, tensors = mlx.decode_mlx(raw, tensors)
    if base_model_name is not None:
        raw = {**raw, _BASE_FIELD: base_model_name}
    adapter = peft.decode_adapter(PeftConfig(raw), tensors, name, expert_layout)
    origin = "mlx" if is_mlx else "peft"
    kept = received if adapter.is_as_it_came and not is_mlx else None
    return store_import(store, limits, adapter, origin, precondition, received=kept)


def store_import(
    store: SetView,
    limits: Limits,
    adapter: peft.PeftAdapter,
    origin: str,
    precondition: Precondition,
    *,
    received: ReceivedUpload | None = None,
) -> Imported:
    """Create or replace the set of a decoded upload, whose file is kept if it is `received`.

    Raises RankTooLargeError, TooManyModulesError, MemoryBudgetError and errors of `precondition`.
    """
    name = adapter.lora_set.adapter_name
    adapters = adapter.lora_set.registry.adapters
    limits.check_modules(len(adapters))
    for one in adapters.values():
        limits.check_rank(one.rank)
    with store.lock(name):
        previous = _record_or_none(store, name)
        precondition(previous)
        stored = _write(
            store,
            limits,
            adapter.lora_set,
            origin=origin,
            previous=previous,
            adapter_config=adapter.config,
            received=None if received is None else (received, adapter.names),
        )
    norms = {module: delta_norm(one) for module, one in stored.lora_set.registry.adapters.items()}
    return Imported(stored, previous is None, adapter.ignored_keys, adapter.warnings, norms)


def name_base(
    store: SetView, limits: Limits, name: str, base_model_name: str, precondition: Precondition
) -> StoredSet:
    """Change the name of the model that a set is for; raises SetNotFoundError."""
    with store.lock(name):
        present = store.read(name)
        precondition(present.record)
        raw = present.adapter_config
        return _write(
            store,
            limits,
            replace(present.lora_set, base_model_name=base_model_name),
            origin=present.record.origin,
            previous=present.record,
            adapter_config=None if raw is None else {**raw, _BASE_FIELD: base_model_name},
        )


def list_sets(
    store: SetView, *, limit: int, cursor: str | None, base_model_name: str | None, prefix: str
) -> tuple[list[SetRecord], str | None]:
    """Return up to `limit` records after `cursor`, sorted by name, and the next cursor."""
    found = store.page(prefix, after=cursor or "", base_model_name=base_model_name, limit=limit + 1)
    return found[:limit], found[limit - 1].name if len(found) > limit else None


def delete_set(store: SetView, name: str, precondition: Precondition) -> None:
    """Delete a set; raises SetNotFoundError and the errors of `precondition`."""
    with store.lock(name):
        precondition(store.read_record(name))
        store.delete(name)


def get_adapter(stored: StoredSet, module: str) -> LoraAdapter:
    """Return the adapter of `module`; raises AdapterNotFoundError."""
    registry = stored.lora_set.registry
    adapter = registry.get(module)
    if adapter is None:
        raise AdapterNotFoundError(module, stored.record.name, registry.module_names())
    return adapter


def put_new_adapter(
    store: SetView,
    limits: Limits,
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
        limits.check_rank(own.rank)
        needed = adapter_bytes(d_in, d_out, own.rank)
        limits.check_budget(store, name, needed)
        reserved.add(needed)
        return LoraAdapter.new(d_in, d_out, own)

    with Reservation(memory) as reserved:
        return _put_adapter(store, limits, name, module, make, precondition, initialized=True)


def put_weights(
    store: SetView,
    limits: Limits,
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
    limits.check_rank(rank)

    def make(present: StoredSet) -> LoraAdapter:
        base = present.record.config
        own = LoraConfig(
            rank, base.alpha if alpha is None else alpha, base.dropout, base.target_modules
        )
        return LoraAdapter(own, a_matrix, b_matrix, own.scaling)

    return _put_adapter(store, limits, name, module, make, precondition, initialized=False)


def delete_adapter(
    store: SetView, limits: Limits, name: str, module: str, precondition: Precondition
) -> None:
    """Remove the adapter of `module` from a set, and the bias that it replaces."""
    with store.lock(name):
        present = store.read(name)
        precondition(present.record)
        get_adapter(present, module)
        lora_set = present.lora_set
        kept = {
            one: array for one, array in lora_set.replacements.items() if one != f"{module}.bias"
        }
        _write(
            store,
            limits,
            replace(lora_set, registry=lora_set.registry.remove(module), replacements=kept),
            origin=present.record.origin,
            previous=present.record,
            # peft loads a targeted module without tensors as an adapter that changes nothing.
            adapter_config=present.adapter_config,
        )


def export_config(stored: StoredSet) -> bytes:
    """Return the set's adapter_config.json."""
    config = peft.encode_config(stored.lora_set, stored.adapter_config)
    return f"{json.dumps(config, indent=2)}\n".encode()


def _write(
    store: SetView,
    limits: Limits,
    lora_set: BonsaiLoraSet,
    *,
    origin: str,
    previous: SetRecord | None,
    adapter_config: Mapping[str, Any] | None = None,
    received: tuple[ReceivedUpload, Mapping[str, str]] | None = None,
) -> StoredSet:
    """Write a set within the memory budget, under the lock that guards the budget."""
    with store.lock_all():
        limits.check_budget(store, lora_set.adapter_name, lora_set.total_memory_bytes())
        return store.write(
            lora_set,
            origin=origin,
            now=_now(),
            previous=previous,
            adapter_config=adapter_config,
            received=received,
        )


def store_new(
    store: SetView,
    limits: Limits,
    lora_set: BonsaiLoraSet,
    *,
    origin: str,
    adapter_config: Mapping[str, Any] | None = None,
) -> StoredSet:
    """Store a computed set under a name that is free; raises SetExistsError, MemoryBudgetError."""
    with store.lock(lora_set.adapter_name):
        refuse_existing(store, lora_set.adapter_name)
        return _write(
            store, limits, lora_set, origin=origin, previous=None, adapter_config=adapter_config
        )


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


def _put_adapter(
    store: SetView,
    limits: Limits,
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
        limits.check_modules(len(changed.adapters))
        unmixed = initialized and present.record.origin == "initialized"
        stored = _write(
            store,
            limits,
            present.lora_set.with_registry(changed),
            origin="initialized" if unmixed else "mixed",
            previous=present.record,
        )
        return stored, registry.get(module) is None


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


def refuse_existing(store: SetView, name: str) -> None:
    """Raise SetExistsError if there is a set of this name."""
    if _record_or_none(store, name) is not None:
        raise SetExistsError(
            f"a set named {name!r} already exists; DELETE /v1/sets/{name} first, or PUT a PEFT "
            "adapter to replace it",
            set=name,
        )


def _record_or_none(store: SetView, name: str) -> SetRecord | None:
    try:
        return store.read_record(name)
    except SetNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
