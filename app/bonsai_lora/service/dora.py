"""DoRA, whose outputs need the base: W x from the caller, row norms from the checkpoint."""

from weakref import WeakKeyDictionary

from bonsai_lora.checkpoints.bases import Base, BaseFolder, row_norms
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import Floats
from bonsai_lora.errors import DoraNeedsBaseError, ShapeMismatchError
from bonsai_lora.storage.setfile import StoredSet

_norms: WeakKeyDictionary[LoraAdapter, tuple[Base, Floats]] = WeakKeyDictionary()


def norms_of(stored: StoredSet, module: str, adapter: LoraAdapter, bases: BaseFolder) -> Floats:
    """Return the row norms (d_out,) of W + scaling * B @ A; remembered per adapter and base.

    Raises DoraNeedsBaseError where no base of the set's base_model_name has such a weight.
    """
    base = bases.find(stored.lora_set.base_model_name)
    weight = None if base is None else base.tensor(f"{module}.weight")
    if base is None or weight is None:
        raise DoraNeedsBaseError(
            f"module {module!r} is DoRA, whose outputs depend on the norms of the base weights, "
            f"and no base named {stored.lora_set.base_model_name!r} with that module is "
            "registered; put its folder under the setting bases",
            module=module,
            base_model_name=stored.lora_set.base_model_name,
        )
    shape = (adapter.d_out, adapter.d_in)
    if weight.shape != (shape if adapter.layer == "linear" else shape[::-1]):
        raise ShapeMismatchError(
            f"base {base.name!r} has {module!r} of shape {list(weight.shape)}, but the adapter is "
            f"for {list(shape)}",
            module=module,
            got=list(weight.shape),
            expected=list(shape),
        )
    known = _norms.get(adapter)
    if known is None or known[0] is not base:
        known = _norms[adapter] = (base, row_norms(weight, adapter))
    return known[1]
