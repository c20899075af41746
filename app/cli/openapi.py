"""`python -m app.cli.openapi FILE`: write the OpenAPI document."""

import json
import sys
from pathlib import Path

from app.api.app import create_app
from app.settings import Settings


def render() -> str:
    """Return the OpenAPI document of the service as text."""
    document = create_app(Settings(store="memory:")).openapi()
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
