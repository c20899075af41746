"""Merged models: a base with weighted sets, cached."""

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from bonsai_lora.checkpoints.base import Base
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
from bonsai_lora.checkpoints.merged_files import Rendering, hub_files, merged_files
from bonsai_lora.checkpoints.parts import MergedFile
from bonsai_lora.errors import BaseNotFoundError, InvalidRequestError, counted
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.setfile import StoredSet

_REMEMBERED = 32

WeightedSets = list[tuple[str, float]]
"""Names of sets with their weights."""


class MergedModels:
    """Makes merged models of bases and sets, and caches the last ones while they are current."""

    def __init__(self, bases: BaseFolder) -> None:
        self._bases = bases
        self._known: OrderedDict[
            tuple[str, tuple[tuple[str, float], ...], str | None],
            tuple[Base, list[StoredSet], MergedModel],
        ] = OrderedDict()
        self._files: WeakKeyDictionary[
            MergedModel, tuple[Rendering | None, Mapping[str, MergedFile]]
        ] = WeakKeyDictionary()

    def get(
        self, store: SetView, base_name: str, sets: WeightedSets, match: str | None = None
    ) -> MergedModel:
        """Return `base_name` with `sets` of `store` merged in, all at their current versions.

        `match` is the prefix of the tensor names that ambiguous paths mean. Raises
        BaseNotFoundError, SetNotFoundError, and the errors of MergedModel.
        """
        try:
            base = self._bases.get(base_name)
        except BaseNotFoundError:
            self._forget(base_name)
            raise
        stored = [store.read(name) for name, _ in sets]
        key = (base_name, tuple(sets), match)
        known = self._known.get(key)
        if known is not None and known[0] is base and known[1] == stored:
            with contextlib.suppress(KeyError):  # another thread may evict it meanwhile
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

    def files(
        self, model: MergedModel, rendering: Rendering | None = None
    ) -> Mapping[str, MergedFile]:
        """Return the files of a merged model by name: by default, those that Hub clients load.

        Raises the errors of merged_files.
        """
        known = self._files.get(model)
        if known is None or known[0] != rendering:
            files = hub_files(model) if rendering is None else merged_files(model, rendering)
            known = self._files[model] = rendering, files
        return known[1]

    def _forget(self, base_name: str) -> None:
        """Drop a deleted base, whose open mappings would keep its disk space in use."""
        for key in [key for key in list(self._known) if key[0] == base_name]:
            self._known.pop(key, None)


def weighted_sets(name: str, scale: float, others: list[str], weights: list[float]) -> WeightedSets:
    """Return `name` with weight `scale`, and `others` with their `weights` (default: 1).

    Raises InvalidRequestError for more weights than sets, or a set named twice.
    """
    if len(weights) > len(others):
        raise InvalidRequestError(
            f"the request has {counted(len(weights), 'weight')} for "
            f"{counted(len(others), 'additional set')}; give at most one "
            "weight per set",
            field="weight",
        )
    padded = [*weights, *[1.0] * (len(others) - len(weights))]
    # Adding 0.0 turns -0.0 into 0.0, so that both are the same model.
    sets = [
        (one, weight + 0.0) for one, weight in zip([name, *others], [scale, *padded], strict=True)
    ]
    if len({one for one, _ in sets}) != len(sets):
        raise InvalidRequestError(
            "a set is named twice; name it once, with one weight", field="set"
        )
    return sets
