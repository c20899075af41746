"""Parse and build the tensor names of PEFT adapters.

Names are as peft 0.21.2 writes and reads them (src/peft/utils/save_and_load.py and other.py), plus
the parts that torch.compile, DDP, FSDP and DeepSpeed insert when a wrapped model is saved.
"""

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field

from bonsai_lora.errors import InvalidAdapterError
from bonsai_lora.formats.names import check_module_name

PREFIX = "base_model.model."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"  # noqa: S105
"""Suffix of the rows of trainable_token_indices, which are whole rows despite the name."""

Parts = dict[str, str]
"""Part of an adapter (A, B, bias, embedding_A, embedding_B, magnitude) -> tensor name."""

_LORA_KEY = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<ending>\.weight|\.bias)?"
)
_PREFIX = re.compile(r"^base_model\.(?:model\.)?")
_HEAD = re.compile(r"(?!base_model\.)(.+?\.)base_model\.model\.")
"""What precedes peft's prefix: the name of a class that holds the model, such as TRL's."""
_BASE_LAYER = re.compile(r"(?:\.token_adapter)?\.base_layer(?=\.(?:weight|bias)$)")
_SAVED = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?(?=\.)")
_ORIGINAL = re.compile(r"\.original_module(?=\.)")
_NAMED_ROWS = re.compile(rf"({re.escape(TOKEN_ROWS)})\.[^.]+$")
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
)
"""Path parts that come from torch.compile, FSDP, DeepSpeed and checkpointing only."""
_DDP = "module."


@dataclass(slots=True)
class Keys:
    """The classified tensor names of one file."""

    modules: dict[str, Parts] = field(default_factory=dict)
    """Module -> the parts of its adapter."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Parameter of the base -> name of the tensor that replaces it."""
    originals: list[str] = field(default_factory=list)
    """Copies of the replaced weights, and duplicates of the replacements."""
    wrappers: set[str] = field(default_factory=set)
    """Wrappers whose names were removed from the keys."""


def sort_uploaded(keys: Iterable[str]) -> Keys:
    """Classify the tensor names of an uploaded file, with wrappers removed.

    Raises InvalidAdapterError if two keys mean the same tensor, or if only some keys have a wrapper
    whose name could also belong to the model.
    """
    wrappers: set[str] = set()
    paths = _unwrapped(list(keys), wrappers)
    found = _sort(paths)
    found.wrappers = wrappers
    return found


def group_keys(keys: Iterable[str]) -> tuple[dict[str, Parts], dict[str, str]]:
    """Return the tensor names of adapters by module and part, and the others by parameter.

    The prefix `base_model.model.` or `base_model.` and the adapter name within a key are optional.
    Raises InvalidAdapterError if two keys mean the same tensor.
    """
    found = _sort(_without_prefix({key: key for key in keys}))
    return found.modules, found.parameters


def _sort(paths: Mapping[str, str]) -> Keys:
    found = Keys()
    adapters: set[str | None] = set()
    saved: dict[str, str] = {}
    for key, path in paths.items():
        match = _LORA_KEY.fullmatch(path)
        part = None if match is None else _part(match["part"], match["ending"])
        if match is not None and part is not None:
            module = check_module_name(match["module"])
            _place(found.modules.setdefault(module, {}), part, key)
            if part != "magnitude":  # some versions of peft keep the adapter name in it
                adapters.add(match["adapter"])
        elif _ORIGINAL.search(path):
            found.originals.append(key)
        elif _SAVED.search(path):
            _place(saved, parameter_of(path), key)
        else:
            _place(found.parameters, parameter_of(path), key)
    if len(adapters) > 1:
        names = ", ".join(sorted(str(one) for one in adapters)[:8])
        raise InvalidAdapterError(
            f"the keys name several adapters ({names}); save each to its own file"
        )
    # If both exist, peft loads the one without `modules_to_save` in its name.
    found.originals += [key for name, key in saved.items() if name in found.parameters]
    found.parameters = saved | found.parameters
    return found


def parameter_of(path: str) -> str:
    """Return the base's name of a parameter, without the parts that peft inserts."""
    before, path = None, _NAMED_ROWS.sub(r"\1", path)
    while path != before:
        before, path = path, _BASE_LAYER.sub("", _SAVED.sub("", path))
    return path


def tensor_name(module: str, part: str) -> str:
    """Return peft's name for a part of a module's adapter."""
    endings = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "embedding_A": "lora_embedding_A",
        "embedding_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }
    return f"{PREFIX}{module}.{endings[part]}"


def parameter_names(parameters: Collection[str], adapted: Container[str]) -> dict[str, str]:
    """Return the name from which peft loads each of `parameters`.

    A module that peft wraps, because it is in `adapted` or has token rows, keeps its own weights
    inside the wrapper.
    """
    names = {}
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        inside = ""
        if kind in ("weight", "bias") and module in adapted:
            inside = "base_layer."
        elif kind == "weight" and module + TOKEN_ROWS in parameters:
            inside = "token_adapter.base_layer."
        names[parameter] = f"{PREFIX}{module}.{inside}{kind}"
    return names


def _place(found: dict[str, str], name: str, key: str) -> None:
    if name in found:
        raise InvalidAdapterError(
            f"{key!r} and {found[name]!r} mean the same tensor; remove one of them",
            keys=[key, found[name]],
        )
    found[name] = key


def _part(part: str, ending: str | None) -> str | None:
    """Return the part of an adapter that a key names; None if its ending is invalid."""
    if part == "lora_A":
        return "A" if ending == ".weight" else None
    if part == "lora_B":
        return {".weight": "B", ".bias": "bias"}.get(ending or "")
    if part == "lora_magnitude_vector":
        return "magnitude" if ending != ".bias" else None
    return part.removeprefix("lora_") if ending is None else None


def _unwrapped(keys: list[str], wrappers: set[str]) -> dict[str, str]:
    """Return each key without prefix and wrappers; add the removed ones to `wrappers`."""
    paths = {}
    for key in keys:
        parts = key.split(".")
        wrappers |= _WRAPPERS.intersection(parts)
        paths[key] = ".".join(part for part in parts if part not in _WRAPPERS)
    paths = _without(_DDP, paths, wrappers)
    heads = {match[1] for path in paths.values() if (match := _HEAD.match(path))}
    for head in sorted(heads)[:1]:
        paths = _without(head, paths, wrappers)
    paths = _without_prefix(paths)
    while True:
        rest = _without(_DDP, _without(PREFIX, paths, wrappers), wrappers)
        if rest == paths:
            return paths
        paths = rest


def _without(wrapper: str, paths: dict[str, str], wrappers: set[str]) -> dict[str, str]:
    """Remove a leading `wrapper` from the paths; raises unless all or none have it."""
    wrapped = [key for key, path in paths.items() if path.startswith(wrapper)]
    if not wrapped:
        return paths
    if len(wrapped) < len(paths):
        raise InvalidAdapterError(
            f"{len(wrapped)} of {len(paths)} keys, such as {wrapped[0][:200]!r}, start with "
            f"{wrapper!r}, the name of a wrapper; rename the keys as peft does",
            keys=wrapped[:64],
        )
    wrappers.add(wrapper.removesuffix("."))
    return {key: path.removeprefix(wrapper) for key, path in paths.items()}


def _without_prefix(paths: dict[str, str]) -> dict[str, str]:
    return {key: _PREFIX.sub("", path, count=1) for key, path in paths.items()}
