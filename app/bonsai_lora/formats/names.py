"""Names of sets, modules and content."""

import re

from bonsai_lora.errors import InvalidNameError

SET_NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
MODULE_NAME_PATTERN = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$"
MODULE_NAME_LENGTH = 256
RESERVED_SET_NAMES = frozenset({"adapters", "api", "bases", "mixed", "stats"})
RESERVED_BASE_NAMES = RESERVED_SET_NAMES | {"docs", "page", "v1", "v2"}
"""Bases are the first part of a path, beside the routes of the service."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_SET_NAME = re.compile(SET_NAME_PATTERN)
_MODULE_NAME = re.compile(MODULE_NAME_PATTERN)
_SHA256 = re.compile("[0-9a-f]{64}")


def check_set_name(name: str) -> str:
    """Return `name`; raises InvalidNameError if a new set may not have it."""
    if name in RESERVED_SET_NAMES:
        raise InvalidNameError(
            f"the name {name!r} is reserved, as are "
            f"{', '.join(sorted(RESERVED_SET_NAMES - {name}))}; choose a different name",
            got=name,
        )
    if not is_set_name(name):
        raise InvalidNameError(
            f"{name[:120]!r} cannot name a set; expected a letter or digit, then at most 95 "
            "letters, digits, '.', '_' or '-'",
            got=name[:120],
            expected=SET_NAME_PATTERN,
        )
    return name


def is_set_name(name: str) -> bool:
    """Return whether a stored set can have this name; older releases reserved fewer."""
    return _SET_NAME.fullmatch(name) is not None


def is_base_name(name: str) -> bool:
    """Return whether a base can have this name."""
    return is_set_name(name) and name not in RESERVED_BASE_NAMES


def is_sha256(text: str) -> bool:
    """Return whether `text` is a SHA-256 in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None


def check_module_name(name: str) -> str:
    """Return `name`; raises InvalidNameError unless it is parts joined by dots."""
    if len(name) > MODULE_NAME_LENGTH or not _MODULE_NAME.fullmatch(name):
        raise InvalidNameError(
            f"{name[:120]!r} cannot name a module; expected letters, digits, '_' and '-' in parts "
            f"joined by dots, at most {MODULE_NAME_LENGTH} characters, such as "
            "model.layers.0.self_attn.q_proj",
            got=name[:120],
            expected=MODULE_NAME_PATTERN,
        )
    return name


def endings(module: str) -> list[str]:
    """Return the module's path and its suffixes that follow a dot."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def base_names(base_model_name: str) -> list[str]:
    """Return the names under which a base called `base_model_name` may be registered.

    These are the whole name, then parts of it as a path of any system: the last part, the
    repository of a hub cache's snapshot, the run of a training checkpoint.
    """
    parts = [part for part in re.split(r"[/\\]", base_model_name) if part not in ("", ".")]
    names = [base_model_name, *parts[-1:]]
    for place, part in enumerate(parts):
        if part.startswith("models--"):
            names.append(part.rpartition("--")[2])
        if place and _CHECKPOINT.fullmatch(part):
            names.append(parts[place - 1])
    return list(dict.fromkeys(names))
