"""Create, import, list, export and delete sets; `adapters` changes their modules."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bonsai_lora.core.cast import Array
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import adapter_bytes
from bonsai_lora.core.shapes import Shapes
from bonsai_lora.core.spectrum import delta_norm
from bonsai_lora.errors import InvalidRequestError, SetExistsError
from bonsai_lora.formats import mlx, peft
from bonsai_lora.formats.experts import ExpertLayout
from bonsai_lora.formats.names import check_set_name
from bonsai_lora.formats.peft_config import PeftConfig, parse_config
from bonsai_lora.service.budget import Budget, Reservation
from bonsai_lora.service.retry import repeated
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.protocol import Page
from bonsai_lora.storage.setfile import SetRecord, Source, StoredSet
from bonsai_lora.storage.upload import ReceivedUpload, Upload

Precondition = Callable[[SetRecord | None], None]
"""Called with the current record (None: no such set); raises PreconditionFailedError."""


_BASE_FIELD = "base_model_name_or_path"


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a caller says of an upload; None is what its files say."""

    base_model_name: str | None = None
    expert_b_layout: ExpertLayout | None = None
    """Column order of B for fused experts."""
    architecture: str | None = None
    """The `general.architecture` whose tensor names a GGUF LoRA has."""


AS_SENT = ImportOptions()
"""Nothing: an upload is imported as its files say."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A set made from an upload, and the report of the import."""

    stored: StoredSet
    created: bool
    ignored_keys: list[str]
    warnings: list[str]
    delta_norms: Mapping[str, float]
    is_changed: bool = True
    """False if the set came from the same source before, and stays as it is."""

    @classmethod
    def unchanged(cls, stored: StoredSet) -> "Imported":
        """Return the report of an import that changed nothing."""
        return cls(stored, False, [], [], _norms_of(stored), is_changed=False)


@repeated
def create_set(
    store: SetView,
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
    store.limits.check_rank(config.rank)
    kept = {module: shape for module, shape in shapes.items() if config.targets(module)}
    store.limits.check_modules(len(kept))
    if shapes and not kept:
        raise InvalidRequestError(
            f"target_modules {list(config.target_modules)} matches none of the modules "
            f"{list(shapes)[:8]}; name some of them, or send an empty list for all",
            field="target_modules",
        )
    with store.lock(name):
        refuse_existing(store, name)
        needed = sum(adapter_bytes(*shape, config.rank) for shape in kept.values())
        store.check_budget(name, needed)
        with Reservation(memory) as reserved:
            reserved.add(needed)
            lora_set = BonsaiLoraSet.new(config, base_model_name, name).add_adapters(kept)
            wanted = NextVersion(lora_set=lora_set, origin="initialized", previous=None)
            return store.write(wanted)


def import_adapter(
    store: SetView,
    name: str,
    raw_config: bytes,
    upload: Upload,
    precondition: Precondition,
    options: ImportOptions = AS_SENT,
    source: Source | None = None,
) -> Imported:
    """Create or replace a set from a PEFT or MLX adapter: its configuration and safetensors file.

    Raises the errors of `peft.decode_adapter`, `mlx.decode_mlx`, `Upload.finish` and
    `store_import`, and InvalidNameError, and then changes nothing.
    """
    check_set_name(name)
    raw = parse_config(raw_config)
    store.limits.check_tensors(upload.count_tensors())
    received = upload.finish()
    tensors: Mapping[str, Array] = received.tensors
    is_mlx = mlx.is_mlx(raw, tensors)
    if is_mlx:
        raw, tensors = mlx.decode_mlx(raw, tensors)
    if options.base_model_name is not None:
        raw = {**raw, _BASE_FIELD: options.base_model_name}
    adapter = peft.decode_adapter(PeftConfig(raw), tensors, name, options.expert_b_layout)
    origin = "mlx" if is_mlx else "peft"
    kept = received if adapter.is_as_it_came and not is_mlx else None
    return store_import(store, adapter, origin, precondition, received=kept, source=source)


@repeated
def store_import(
    store: SetView,
    adapter: peft.PeftAdapter,
    origin: str,
    precondition: Precondition,
    *,
    received: ReceivedUpload | None = None,
    source: Source | None,
) -> Imported:
    """Create or replace the set of a decoded upload, whose file is kept if it is `received`.

    A set that came from the same `source` stays as it is. Raises RankTooLargeError,
    TooManyModulesError, MemoryBudgetError and errors of `precondition`.
    """
    name = adapter.lora_set.adapter_name
    adapters = adapter.lora_set.registry.adapters
    store.limits.check_modules(len(adapters))
    for one in adapters.values():
        store.limits.check_rank(one.rank)
    with store.lock(name):
        previous = store.find_record(name)
        precondition(previous)
        if previous is not None and source is not None and previous.source == source:
            return Imported.unchanged(store.read(name))
        wanted = NextVersion(
            lora_set=adapter.lora_set,
            origin=origin,
            previous=previous,
            adapter_config=adapter.config,
            received=None if received is None else (received, adapter.names),
            source=source,
        )
        stored = store.write(wanted)
    return Imported(
        stored, previous is None, adapter.ignored_keys, adapter.warnings, _norms_of(stored)
    )


def _norms_of(stored: StoredSet) -> Mapping[str, float]:
    return {module: delta_norm(one) for module, one in stored.lora_set.registry.adapters.items()}


@repeated
def name_base(
    store: SetView, name: str, base_model_name: str, precondition: Precondition
) -> StoredSet:
    """Change the name of the model that a set is for; raises SetNotFoundError."""
    with store.lock(name):
        present = store.read(name)
        precondition(present.record)
        raw = present.adapter_config
        wanted = NextVersion(
            lora_set=replace(present.lora_set, base_model_name=base_model_name),
            origin=present.record.origin,
            previous=present.record,
            adapter_config=None if raw is None else {**raw, _BASE_FIELD: base_model_name},
        )
        return store.write(wanted)


def list_sets(
    store: SetView, *, limit: int, cursor: str | None, base_model_name: str | None, prefix: str
) -> tuple[Page, str | None]:
    """Return up to `limit` records after `cursor`, sorted by name, and the next cursor."""
    page = store.page(prefix, after=cursor or "", base_model_name=base_model_name, limit=limit + 1)
    found = page.records
    return replace(page, records=found[:limit]), (
        found[limit - 1].name if len(found) > limit else None
    )


@repeated
def delete_set(store: SetView, name: str, precondition: Precondition) -> None:
    """Delete a set; raises SetNotFoundError and the errors of `precondition`."""
    with store.lock(name):
        precondition(store.read_record(name))
        store.delete(name)


def export_config(stored: StoredSet) -> bytes:
    """Return the set's adapter_config.json."""
    config = peft.encode_config(stored.lora_set, stored.adapter_config)
    return f"{json.dumps(config, indent=2)}\n".encode()


@repeated
def store_new(store: SetView, wanted: NextVersion) -> StoredSet:
    """Store a computed set under a name that is free; raises SetExistsError, MemoryBudgetError."""
    with store.lock(wanted.name):
        refuse_existing(store, wanted.name)
        return store.write(wanted)


def refuse_existing(store: SetView, name: str) -> None:
    """Raise SetExistsError if there is a set of this name."""
    if store.find_record(name) is not None:
        raise SetExistsError(
            f"a set named {name!r} already exists; choose a different name, or DELETE "
            f"/v1/sets/{name} first",
            set=name,
        )
