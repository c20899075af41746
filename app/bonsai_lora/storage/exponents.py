"""Distributions of the weights of bases, kept by the identity of the base."""

import contextlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from bonsai_lora.core.rounding import Weights

_MOST_FILES = 64
"""Files of bases that are gone are removed when there are more, the oldest first."""


class ExponentFolder:
    """A folder with a file per base. It is a cache: what cannot be written is computed again."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, digest: str) -> Mapping[str, Weights] | None:
        """Return what was written for a base; None if nothing was."""
        try:
            found = json.loads((self._root / f"{digest}.json").read_bytes())
            return {
                name: Weights({int(one): count for one, count in exponents.items()}, on_grid)
                for name, (exponents, on_grid) in found.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, digest: str, weights: Mapping[str, Weights]) -> None:
        """Write the distributions of a base."""
        with contextlib.suppress(OSError):
            self._root.mkdir(exist_ok=True)
            temporary = self._root / f"{secrets.token_hex(8)}.tmp"
            temporary.write_text(json.dumps(weights), encoding="utf-8")
            temporary.replace(self._root / f"{digest}.json")
            paths = sorted(self._root.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in paths[:-_MOST_FILES]:
                path.unlink()
