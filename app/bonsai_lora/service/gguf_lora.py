"""GGUF LoRA files: import one as a set, and export a set as one."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from bonsai_lora.checkpoints.base import Base
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.gguf_base import GgufBase
from bonsai_lora.checkpoints.gguf_lora import LoraFile, Model, encode_lora
from bonsai_lora.checkpoints.safetensors_base import SafetensorsBase
from bonsai_lora.core.shapes import MODELS
from bonsai_lora.errors import InvalidRequestError, UnsupportedAdapterError
from bonsai_lora.formats import peft
from bonsai_lora.formats.foreign import check_gguf_start
from bonsai_lora.formats.gguf import read_header, reader_of
from bonsai_lora.formats.gguf_lora import (
    BASE_NAME_KEY,
    check_is_lora,
    copied_bytes,
    count_modules,
    decode_lora,
    float32_bytes,
)
from bonsai_lora.formats.gguf_names import ARCHITECTURES, Heads, to_gguf
from bonsai_lora.formats.names import base_names, check_set_name
from bonsai_lora.formats.peft_config import PeftConfig
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.service.sets import AS_SENT, Imported, ImportOptions, Precondition, store_import
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.setfile import Source, StoredSet
from bonsai_lora.storage.upload import WholeUpload

_ARCHITECTURES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3",
    "llama": "llama", "mistral": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "qwen3_5": "qwen35", "qwen3_5_text": "qwen35",
}  # fmt: skip
"""`model_type` of a config.json -> `general.architecture` of the model's GGUF file."""
_REMEMBERED = 4096
_REVISION = 1
"""Part of the ETag; changes with the bytes of the files that are written."""

_DEFAULT = "qwen3"
"""Architecture of Bonsai and Qwen3. llama.cpp refuses a file of a different one than the base's."""

LoraDtype = Literal["F32", "F16", "BF16", "Q8_0"]
"""Types of the tensors of a GGUF LoRA."""


class CheckedFiles:
    """ETags of GGUF LoRAs whose values fit their types: they are computed once, to be checked."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def check(self, file: LoraFile) -> None:
        """Raise UnsupportedAdapterError for values beyond their type, unless known to fit."""
        if file.etag not in self._known:
            file.check_values()
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known.add(file.etag)


def import_gguf(
    store: SetView,
    bases: BaseFolder,
    name: str,
    upload: WholeUpload,
    reserve: Callable[[int], None],
    precondition: Precondition,
    options: ImportOptions = AS_SENT,
    source: Source | None = None,
) -> Imported:
    """Create or replace a set from a GGUF LoRA.

    `reserve` counts memory before it is taken. Raises MalformedGgufError, the errors of
    `read_header`, `reserve`, `decode_lora`, `peft.decode_adapter` and `store_import`, and then
    changes nothing.
    """
    check_set_name(name)
    architecture = options.architecture
    content = upload.finish()
    check_gguf_start(content)
    read = reader_of(content)
    header = read_header(read, len(content), limit=store.limits.max_header_bytes)
    check_is_lora(header)
    # Before anything is made: a stack of a few kilobytes has thousands of experts.
    store.limits.check_modules(count_modules(header))
    store.check_budget(name, float32_bytes(header))
    reserve(copied_bytes(header, architecture))
    own_name = header.get(BASE_NAME_KEY)
    named = own_name if options.base_model_name is None else options.base_model_name
    base = named if isinstance(named, str) else ""
    model = _model_of(bases.find(base), base)
    found = decode_lora(header, read, architecture, None if model is None else model.heads)
    config = {**found.config, "base_model_name_or_path": base or None}
    adapter = peft.decode_adapter(PeftConfig(config), found.tensors, name)
    adapter.ignored_keys.extend(found.ignored_keys)
    own = {**adapter.config, peft.GGUF_ARCHITECTURE: architecture or header.architecture}
    return store_import(store, replace(adapter, config=own), "gguf", precondition, source=source)


def export_gguf(
    stored: StoredSet,
    bases: BaseFolder,
    dtype: LoraDtype,
    architecture: str | None,
    *,
    is_folded: bool = False,
) -> LoraFile:
    """Return a set as a GGUF LoRA.

    The architecture is the given one, else that of the base in the service or of a known model,
    else that of the GGUF LoRA that was uploaded, else qwen3 if all modules have names in it. Raises
    InvalidRequestError if it is unknown, UnsupportedAdapterError for a set that no GGUF LoRA can
    express.
    """
    lora_set = stored.lora_set
    base = bases.find(lora_set.base_model_name)
    model = _model_of(base, lora_set.base_model_name)
    if model is None or architecture not in (None, model.architecture):
        model = Model(_architecture_of(stored, architecture))
    folding = base.folding if is_folded and base is not None else None
    if is_folded and folding is None:
        raise UnsupportedAdapterError(
            f"folded is true, but no base {lora_set.base_model_name!r} with Hadamard-folded "
            "weights is served; remove folded, which only such bases need",
            field="folded",
        )
    options = BaseOptions.of(stored.adapter_config)
    digest = base.digest if folding is not None and base is not None else ""
    etag = _etag(stored, dtype, model, digest)
    return encode_lora(lora_set, options, model, dtype, etag, folding)


def _etag(stored: StoredSet, dtype: str, model: Model, folded_for: str) -> str:
    """Return an ETag that differs wherever the bytes do; `folded_for` is the digest of a base."""
    about = (_REVISION, dtype, model, *([folded_for] if folded_for else ()))
    digest = hashlib.sha256(repr(about).encode()).hexdigest()
    return f'{stored.record.etag[:-1]}-gguf-{digest[:16]}"'


def _architecture_of(stored: StoredSet, given: str | None) -> str:
    if given is None:
        own = (stored.adapter_config or {}).get(peft.GGUF_ARCHITECTURE)
        if isinstance(own, str) and own in ARCHITECTURES:
            return own
        modules = stored.lora_set.registry.adapters
        foreign = [one for one in modules if to_gguf(_DEFAULT, f"{one}.weight") is None]
        if not foreign:
            return _DEFAULT
        problem = (
            f"the base {stored.lora_set.base_model_name[:100]!r} is not served here, and module "
            f"{foreign[0]!r} is unknown for the default architecture {_DEFAULT!r}"
        )
    elif given in ARCHITECTURES:
        return given
    else:
        problem = f"architecture {given!r} is unknown"
    raise InvalidRequestError(
        f"{problem}; give as architecture= one of {', '.join(sorted(ARCHITECTURES))}",
        field="architecture",
        got=given,
        expected=sorted(ARCHITECTURES),
    )


def _model_of(base: Base | None, base_model_name: str) -> Model | None:
    """Return what is known of a base by its files, or by its name; None if nothing is."""
    if isinstance(base, GgufBase):
        is_known = base.architecture in ARCHITECTURES
        known = Model(base.architecture, base.heads, base.is_tied, base.experts)
        return known if is_known else None
    if not isinstance(base, SafetensorsBase):
        return _model_of_name(base_model_name)
    architecture = _ARCHITECTURES.get(base.model_type)
    if architecture is None:
        return None
    inner = base.config.get("text_config")
    config = inner if isinstance(inner, dict) else base.config
    experts = config.get("num_experts", config.get("num_local_experts"))
    return Model(
        architecture,
        _heads_of(config),
        base.is_tied,
        experts if type(experts) is int and experts > 0 else None,
    )


def _model_of_name(base_model_name: str) -> Model | None:
    """Return what is known of a model by its name alone."""
    known = [MODELS[name.lower()] for name in base_names(base_model_name) if name.lower() in MODELS]
    if not known:
        return None
    linear = known[0].linear_attention
    if linear is None:
        return Model("qwen3")
    heads = Heads(
        linear_keys=linear.key_heads,
        linear_values=linear.value_heads,
        linear_key_width=linear.head_dim,
    )
    return Model("qwen35", heads)


def _heads_of(config: Mapping[str, Any]) -> Heads:
    """Return the head counts of a config.json; 0, which row_order refuses, for an unknown one."""

    def count(key: str, default: int = 0) -> int:
        found = config.get(key, default)
        return found if type(found) is int else 0

    queries = count("num_attention_heads")
    return Heads(
        queries,
        count("num_key_value_heads", queries),
        count("linear_num_key_heads"),
        count("linear_num_value_heads"),
        count("linear_key_head_dim"),
    )
