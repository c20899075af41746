"""What inferences cost, counted by model in files that all workers of one service share.

Each process writes to a file of its own and reads all: the sums are true whichever worker is
asked, and outlive a worker that had to be replaced.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(slots=True)
class Counts:
    """Sums since the service started, or since the model last changed; times in nanoseconds."""

    last_ms: int = 0
    """When the last inference ended, in milliseconds since 1970; 0: never."""
    success_count: int = 0
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    rows: int = 0
    vectors: int = 0
    """Rows times modules, of one inference; not kept."""


_SUMS = tuple(field.name for field in fields(Counts) if field.name not in ("last_ms", "vectors"))
_ROW = np.dtype(
    [
        ("model", "S96"),  # as long as a set's name may be
        ("content", "S48"),  # as long as an ETag is
        ("since", "S32"),  # as long as a time in RFC 3339 is
        ("last_ms", "<i8"),
        ("sums", "<i8", len(_SUMS)),
    ]
)
_FIRST_ROWS = 1024
_PATTERN = "counts-*"


class CountFile:
    """The counts of this process, and the sums over all of them. Adding is for one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"counts-{os.getpid()}-{id(self):x}"
        self._path.write_bytes(bytes(_ROW.itemsize * _FIRST_ROWS))
        self._rows = _open(self._path)
        self._places: dict[str, int] = {}

    def add(self, model: str, content: str, since: str, counts: Counts) -> None:
        """Add `counts` to those of `model`, whose content, tagged `content`, is from `since`.

        A newer content starts again from zero; what came late for an older one is left out.
        """
        place = self._places.get(model)
        if place is None:
            place = self._places[model] = len(self._places)
            if place == len(self._rows):
                self._grow()
            self._rows[place] = (model.encode(), b"", b"", 0, 0)
        row: Any = self._rows[place]
        tag = content.encode()
        if row["content"] != tag:
            if since.encode() < row["since"]:
                return
            row["content"], row["since"], row["sums"] = tag, since.encode(), 0
        row["last_ms"] = counts.last_ms
        row["sums"] += [getattr(counts, name) for name in _SUMS]

    def read(self, wanted: dict[str, str]) -> dict[str, Counts]:
        """Return the sums of all processes for the models of `wanted`: model -> content tag."""
        found = {model: Counts() for model in wanted}
        for row in self._all_rows():
            model = row["model"].decode()
            if wanted.get(model) != row["content"].decode():
                continue
            total = found[model]
            total.last_ms = max(total.last_ms, int(row["last_ms"]))
            for name, value in zip(_SUMS, row["sums"].tolist(), strict=True):
                setattr(total, name, getattr(total, name) + value)
        return found

    def _all_rows(self) -> Iterator[Any]:
        for path in self._folder.glob(_PATTERN):
            for row in _open(path):
                if not row["model"]:
                    break
                yield row

    def _grow(self) -> None:
        size = 2 * self._path.stat().st_size
        os.truncate(self._path, size)
        self._rows = _open(self._path)


def _open(path: Path) -> Any:
    return np.memmap(path, _ROW, "r+")
