"""DoRA row norms, computed from the base checkpoint."""

from weakref import WeakKeyDictionary

from bonsai_lora.checkpoints.bases import Base, BaseFolder, row_norms
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats
from bonsai_lora.errors import DoraNeedsBaseError, ShapeMismatchError
from bonsai_lora.storage.setfile import StoredSet

_norms: WeakKeyDictionary[LoraAdapter, tuple[Base, Floats]] = WeakKeyDictionary()


def norms_of(stored: StoredSet, module: str, adapter: LoraAdapter, bases: BaseFolder) -> Floats:
    """Return the row norms (d_out,) of W + scaling * B @ A, cached per adapter and base.

    Raises DoraNeedsBaseError if no base with the set's base_model_name has the module's weight,
    ShapeMismatchError if that has a different shape.
    """
    base = bases.find(stored.lora_set.base_model_name)
    weight = None if base is None else base.tensor(f"{module}.weight")
    if base is None or weight is None:
        raise DoraNeedsBaseError(
            f"module {module!r} is DoRA, whose outputs depend on the base weights, but no base "
            f"named {stored.lora_set.base_model_name!r} has the module; add the checkpoint's "
            "folder under the setting bases",
            module=module,
            base_model_name=stored.lora_set.base_model_name,
        )
    shape = (adapter.d_out, adapter.d_in)
    if weight.shape != (shape if adapter.layer == "linear" else shape[::-1]):
        raise ShapeMismatchError(
            f"module {module!r} has shape {list(weight.shape)} in base {base.name!r}, but the "
            f"adapter is for {list(shape)}; check the set's base_model_name",
            module=module,
            got=list(weight.shape),
            expected=list(shape),
        )
    known = _norms.get(adapter)
    if known is None or known[0] is not base:
        known = _norms[adapter] = (base, row_norms(weight, adapter))
    return known[1]
