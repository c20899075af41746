"""Name what is too long in the product: files over 400 lines, functions over 60."""

import ast
import sys
from pathlib import Path

MOST_IN_FILE = 400
MOST_IN_FUNCTION = 60
APP = Path(__file__).parent.parent / "app"


def too_long(path):
    """Yield a message for the file, and for each function of it, that is too long."""
    text = path.read_text()
    if (lines := text.count("\n")) > MOST_IN_FILE:
        yield f"{path}: {lines} lines, more than {MOST_IN_FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_IN_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {MOST_IN_FUNCTION}"


if __name__ == "__main__":
    found = [message for path in sorted(APP.rglob("*.py")) for message in too_long(path)]
    sys.exit("\n".join(found) or 0)
