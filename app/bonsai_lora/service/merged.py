"""Merged models by name: which base, which sets, at which weights."""

import contextlib
import math
from collections import OrderedDict

from bonsai_lora.checkpoints.bases import Base, BaseFolder
from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
from bonsai_lora.errors import BaseNotFoundError, InvalidRequestError
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.storage.store import SetStore

_REMEMBERED = 32

Weighted = list[tuple[str, float]]
"""Set names with their weights."""


class MergedModels:
    """Makes merged models of bases and sets; the last ones are remembered while they stay true."""

    def __init__(self, bases: BaseFolder, store: SetStore) -> None:
        self._bases = bases
        self._store = store
        self._known: OrderedDict[
            tuple[str, tuple[tuple[str, float], ...], str | None],
            tuple[Base, list[StoredSet], MergedModel],
        ] = OrderedDict()

    def get(self, base_name: str, sets: Weighted, match: str | None = None) -> MergedModel:
        """Return the model of `base_name` with `sets` merged in, as both are now.

        `match` is the start of the names that ambiguous paths mean. Raises BaseNotFoundError,
        SetNotFoundError, and what MergedModel raises.
        """
        try:
            base = self._bases.get(base_name)
        except BaseNotFoundError:
            self._forget(base_name)
            raise
        stored = [self._store.read(name) for name, _ in sets]
        key = (base_name, tuple(sets), match)
        known = self._known.get(key)
        if known is not None and known[0] is base and known[1] == stored:
            with contextlib.suppress(KeyError):  # another thread may drop it meanwhile
                self._known.move_to_end(key)
            return known[2]
        model = MergedModel(
            base,
            [
                Ingredient(
                    one.lora_set, one.record.etag, weight, BaseOptions.of(one.adapter_config)
                )
                for one, (_, weight) in zip(stored, sets, strict=True)
            ],
            match,
        )
        self._known[key] = (base, stored, model)
        while len(self._known) > _REMEMBERED:
            with contextlib.suppress(KeyError):
                self._known.popitem(last=False)
        return model

    def _forget(self, base_name: str) -> None:
        """Let go of a base that is gone, so that its disk comes back."""
        for key in [key for key in list(self._known) if key[0] == base_name]:
            self._known.pop(key, None)


def weighted_sets(name: str, scale: float, others: list[str], weights: list[float]) -> Weighted:
    """Return `name` at `scale` and `others` at their `weights` (default 1).

    Raises InvalidRequestError for a weight that is not finite, more weights than sets, or a set
    named twice.
    """
    if len(weights) > len(others):
        raise InvalidRequestError(
            f"there are {len(weights)} weights for {len(others)} further sets", field="weight"
        )
    padded = [*weights, *[1.0] * (len(others) - len(weights))]
    # 0.0 for -0.0, which is the same model under another name.
    sets = [
        (one, weight + 0.0) for one, weight in zip([name, *others], [scale, *padded], strict=True)
    ]
    if not all(math.isfinite(weight) for _, weight in sets):
        raise InvalidRequestError("scale and weight must be finite numbers", field="weight")
    if len({one for one, _ in sets}) != len(sets):
        raise InvalidRequestError("a set is named twice; give it one weight", field="set")
    return sets
