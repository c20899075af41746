"""Tables on standard output."""

from typing import Any

from bonsai_lora.formats.text import printable


def print_table(head: list[str], rows: list[list[Any]]) -> None:
    """Print rows below a head, in columns."""
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))
