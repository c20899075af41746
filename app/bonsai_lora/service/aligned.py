"""Several sets, module by module."""

from collections.abc import Mapping, Sequence

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.errors import ShapeMismatchError
from bonsai_lora.service.keys import check_scope
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.setfile import StoredSet

MAX_SETS = 64
"""Most sets that are combined or compared at a time."""

Aligned = Sequence[LoraAdapter | None]
"""A module's adapter in each set; None for a set that lacks the module."""


def read_sets(store: SetView, names: Sequence[str]) -> list[StoredSet]:
    """Return the current versions of sets that the caller may read; a repeated name is read once.

    Raises SetNotFoundError, ForbiddenError without the scope `read`.
    """
    check_scope(store.key, "read")
    readable = store.seen_by(store.key, "read")
    found = {name: readable.read(name) for name in dict.fromkeys(names)}
    return [found[name] for name in names]


def align(sets: Sequence[StoredSet]) -> Mapping[str, Aligned]:
    """Return the adapters of all modules of the sets, in the order in which they first appear.

    Raises ShapeMismatchError if a module differs in shape, kind of layer or number of experts.
    """
    names = dict.fromkeys(name for one in sets for name in one.lora_set.registry.adapters)
    found = {name: [one.lora_set.registry.adapters.get(name) for one in sets] for name in names}
    for name, adapters in found.items():
        _check_same(name, sets, adapters)
    return found


def present(adapters: Aligned) -> list[LoraAdapter]:
    """Return a module's adapters in the sets that have it."""
    return [one for one in adapters if one is not None]


def stacked_rank(adapters: Aligned) -> int:
    """Return the sum of the ranks of a module's adapters."""
    return sum(one.rank for one in present(adapters))


def _check_same(module: str, sets: Sequence[StoredSet], adapters: Aligned) -> None:
    if len(set(map(_kind, present(adapters)))) == 1:
        return
    (first, expected), *others = (
        (stored.record.name, one)
        for stored, one in zip(sets, adapters, strict=True)
        if one is not None
    )
    name, got = next(other for other in others if _kind(other[1]) != _kind(expected))
    raise ShapeMismatchError(
        f"module {module!r} is {_describe(got)} in set {name!r}, but {_describe(expected)} in "
        f"{first!r}; use sets for the same model",
        module=module,
        got=_describe(got),
        expected=_describe(expected),
    )


def _kind(adapter: LoraAdapter) -> tuple[object, ...]:
    return adapter.layer, adapter.d_in, adapter.d_out, adapter.experts


def _describe(adapter: LoraAdapter) -> str:
    experts = f" with {adapter.experts} experts" if adapter.experts else ""
    return f"{adapter.layer} {adapter.d_in} -> {adapter.d_out}{experts}"
