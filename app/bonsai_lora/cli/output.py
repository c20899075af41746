"""What commands print, and their exit codes."""

import sys
from collections.abc import Sequence
from typing import Any

from bonsai_lora.formats.text import printable

EXIT_REFUSED = 1
"""The service returned an error, or a set is not as it should be."""
EXIT_USAGE = 2
"""The arguments are wrong, or a file cannot be read."""


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows below a head, in columns."""
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def print_rows(fields: Sequence[str], rows: Sequence[Any]) -> None:
    """Print a table of some fields of each row."""
    print_table([name.upper() for name in fields], [[row[name] for name in fields] for row in rows])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def failed(text: str) -> int:
    """Print why a command cannot run, and return the exit code."""
    for line in text.splitlines():
        print(f"bonsai-lora: {line}", file=sys.stderr)
    return EXIT_USAGE


def plain(error: Exception) -> str:
    """Return the message of an error, without the number that the system gives it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
