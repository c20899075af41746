"""DoRA row norms, computed from the base checkpoint."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from bonsai_lora.checkpoints.base import Base, row_norms
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.orientation import Fit, as_stored, is_any_transposed
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats
from bonsai_lora.errors import DoraNeedsBaseError, ShapeMismatchError, TakesLongError
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.storage.setfile import StoredSet

_norms: WeakKeyDictionary[LoraAdapter, tuple[Base, str, Floats]] = WeakKeyDictionary()


def norms_of(
    stored: StoredSet,
    module: str,
    adapter: LoraAdapter,
    bases: BaseFolder,
    match: str | None,
    *,
    may_take_long: bool,
) -> Floats:
    """Return the row norms (d_out,) of W + scaling * B @ A, cached per adapter and base.

    Raises TakesLongError if they are not cached, unless it `may_take_long`.

    W is the tensor that a merge with the same `match` would change. Raises DoraNeedsBaseError if
    no base with the set's base_model_name has the module's weight, InvalidRequestError if no tensor
    starts with `match` or the module could mean several, ShapeMismatchError if the weight has a
    different shape.
    """
    base = bases.find(stored.lora_set.base_model_name)
    if base is not None and match is not None:
        base.paths.check_match(match)
    name = None if base is None else base.paths.find_one(f"{module}.weight", match)
    if base is None or name is None:
        raise DoraNeedsBaseError(
            f"module {module!r} is DoRA, whose outputs depend on the base weights, but no base "
            f"named {stored.lora_set.base_model_name!r} has the module; add the checkpoint's "
            "folder to the folder that --bases names",
            module=module,
            base_model_name=stored.lora_set.base_model_name,
        )
    known = _norms.get(adapter)
    if known is None or known[:2] != (base, name):
        if not may_take_long:
            raise TakesLongError
        known = _norms[adapter] = (base, name, _norms_in(base, name, stored, module, match))
    return known[2]


def _norms_in(base: Base, name: str, stored: StoredSet, module: str, match: str | None) -> Floats:
    adapter = stored.lora_set.registry.adapters[module]
    own = stored.lora_set.replacements.get(f"{module}.weight")
    weight = base.tensor(name) if own is None else own
    fit = (module, adapter, weight.shape)
    options = BaseOptions.of(stored.adapter_config)
    oriented = as_stored(
        fit,
        base.model_type,
        may_be_transposed=options.is_transposed,
        others_are=is_any_transposed(_fits(base, stored, match)) if options.is_transposed else None,
    )
    shape = (adapter.d_out, adapter.d_in)
    if weight.shape != (shape if oriented.layer == "linear" else shape[::-1]):
        raise ShapeMismatchError(
            f"tensor {name!r} of base {base.name!r} has shape {list(weight.shape)}, but the "
            f"adapter is for {list(shape)}; check the set's base_model_name",
            module=module,
            got=list(weight.shape),
            expected=list(shape),
        )
    return row_norms(weight, oriented)


def _fits(base: Base, stored: StoredSet, match: str | None) -> Iterator[Fit]:
    """Yield the set's modules with the shapes of their base tensors, which show the orientation."""
    for module, adapter in stored.lora_set.registry.adapters.items():
        for name in base.paths.find(f"{module}.weight", match):
            yield module, adapter, base.info(name).shape
