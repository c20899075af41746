"""Inference statistics by model, in files that all workers of a service share.

Each process writes its own file and reads all files, so that every worker reports the same totals
and they survive a worker that is replaced.
"""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(slots=True)
class Counts:
    """Totals since the service started or the model last changed; durations in nanoseconds."""

    last_ms: int = 0
    """End of the last inference in milliseconds since 1970; 0 if there was none."""
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
    """Rows times modules of one inference; not stored."""


_SUMS = tuple(field.name for field in fields(Counts) if field.name not in ("last_ms", "vectors"))
_ROW = np.dtype(
    [
        ("model", "S96"),  # fits the name of a set
        ("content", "S48"),  # fits an ETag
        ("since", "S32"),  # fits an RFC 3339 time
        ("last_ms", "<i8"),
        ("sums", "<i8", len(_SUMS)),
    ]
)
_FIRST_ROWS = 1024
_PATTERN = "counts-*"
_RESTARTS = "worker-restarts"
"""A file that is one byte longer after each restart of a worker."""


class CountFile:
    """The counts of this process, and totals over all processes. Only one thread may call `add`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"counts-{secrets.token_hex(8)}"
        self._path.write_bytes(bytes(_ROW.itemsize * _FIRST_ROWS))
        self._rows = _open(self._path)
        self._row_numbers: dict[str, int] = {}

    def add(self, model: str, content: str, since: str, counts: Counts) -> None:
        """Add `counts` to those of `model`, whose content tag is `content` since the time `since`.

        Counts start from zero when the content changes; late ones for older content are dropped.
        """
        number = self._row_numbers.get(model)
        if number is None:
            number = self._row_numbers[model] = len(self._row_numbers)
            if number == len(self._rows):
                self._grow()
            self._rows[number] = (model.encode(), b"", b"", 0, 0)
        row: Any = self._rows[number]
        tag = content.encode()
        if row["content"] != tag:
            if since.encode() < row["since"]:
                return
            row["content"], row["since"], row["sums"] = tag, since.encode(), 0
        row["last_ms"] = counts.last_ms
        row["sums"] += [getattr(counts, name) for name in _SUMS]

    def read(self, wanted: dict[str, str]) -> dict[str, Counts]:
        """Return the totals over all processes for `wanted`, content tags by model."""
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


def count_restart(folder: Path) -> None:
    """Count a worker that was replaced after it died, in the folder that all workers share."""
    with (folder / _RESTARTS).open("ab") as file:
        file.write(b".")


def read_restarts(folder: Path) -> int:
    """Return the number of restarts counted in `folder`."""
    path = folder / _RESTARTS
    return path.stat().st_size if path.exists() else 0


def _open(path: Path) -> Any:
    return np.memmap(path, _ROW, "r+")
