"""How much of its deltas a merged model keeps, computed in the background and never waited for."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from bonsai_lora.checkpoints.base import Base
from bonsai_lora.checkpoints.exponents import weights_of
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.core.cast import Array, to_float32
from bonsai_lora.core.factors import Values
from bonsai_lora.core.rounding import MANTISSA_BITS, Weights, kept_squares
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.storage.exponents import ExponentFolder

LITTLE = 0.5
"""A gain below it is worth a warning."""

_log = logging.getLogger(__name__)


class Gains:
    """Gains of merged models, and the distributions of weights that they need. Thread-safe."""

    def __init__(self, folder: ExponentFolder) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "gain")
        self._lock = threading.Lock()
        self._weights: WeakKeyDictionary[Base, Mapping[str, Weights]] = WeakKeyDictionary()
        self._found: WeakKeyDictionary[MergedModel, dict[str, float | None]] = WeakKeyDictionary()
        self._begun: set[str] = set()

    def known(self, model: MergedModel, dtype: str | None) -> float | None:
        """Return the gain if changed tensors are stored as `dtype` (None: that of the base).

        None if it is not known yet; then it is computed in the background.
        """
        if dtype is not None and dtype not in MANTISSA_BITS:
            return None
        found = self._found.setdefault(model, {})
        key = dtype or ""
        if key not in found:
            found[key] = None  # until it is computed, and for good if it cannot be
            self._begin(f"{model.digest}/{key}", partial(self._compute, model, dtype))
        return found[key]

    def prepare(self, base: Base) -> None:
        """Look at the weights of a base in the background, unless that is done."""
        if base not in self._weights:
            self._begin(base.digest, partial(self._weights_of, base))

    def _begin(self, what: str, work: Callable[[], object]) -> None:
        with self._lock:
            if what in self._begun:
                return
            self._begun.add(what)
        self._thread.submit(self._run, what, work)

    def _run(self, what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except BonsaiLoraError as error:  # such as a base that was changed meanwhile
            _log.info("what storing merged weights leaves is not known: %s", error.detail)
        except Exception:  # noqa: BLE001 - nobody waits for it
            _log.exception("what storing merged weights leaves could not be computed")
        finally:
            with self._lock:
                self._begun.discard(what)

    def _weights_of(self, base: Base) -> Mapping[str, Weights]:
        known = self._weights.get(base) or self._folder.read(base.digest)
        if known is None:
            known = weights_of(base)
            self._folder.write(base.digest, known)
        self._weights[base] = known
        return known

    def _compute(self, model: MergedModel, dtype: str | None) -> None:
        found = self._found.setdefault(model, {})
        found[dtype or ""] = gain = gain_of(model, self._weights_of(model.base), dtype)
        if gain is not None and gain < LITTLE:
            _log.warning(
                "merging %s into base %r keeps %.0f %% of the deltas, as the stored type rounds "
                "them away; store the merged weights wider, or apply the set beside the base",
                " and ".join(map(repr, model.set_names)),
                model.base.name,
                100 * gain,
            )


def gain_of(model: MergedModel, weights: Mapping[str, Weights], dtype: str | None) -> float | None:
    """Return <D', D> / |D|^2 over all tensors that are changed by added deltas, estimated.

    D is the delta, and D' what the stored weights differ by. None if there is no such tensor.
    """
    kept = total = 0.0
    for name, touched in model.changes.items():
        info = model.base.info(name)
        stored = dtype or info.dtype
        if not touched.is_sum or name not in weights or stored not in MANTISSA_BITS:
            continue
        squares = _row_squares(
            [
                (
                    adapter.stored_factors_of(slice(0, info.shape[0]), slice(0, info.shape[1])),
                    weight * adapter.scaling,
                )
                for adapter, weight in touched.deltas
            ]
        )
        kept += kept_squares(squares, info.shape[1], weights[name], stored)
        total += float(squares.sum())
    return kept / total if total else None


def _row_squares(terms: list[tuple[tuple[Array, Array], float]]) -> Values:
    """Return the squared norms of the rows of sum factor * left @ right."""
    right = np.concatenate([to_float32(right) for (right, _), _ in terms])
    left = np.concatenate([np.float32(factor) * left for (_, left), factor in terms], axis=1)
    squares = np.einsum("ij,ij->i", left @ (right @ right.T), left, dtype=np.float64)
    result: Values = np.maximum(squares, 0)
    return result
