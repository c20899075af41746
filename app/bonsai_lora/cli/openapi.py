"""Write the OpenAPI document: `python -m bonsai_lora.cli.openapi FILE`."""

import json
import sys
from pathlib import Path

from bonsai_lora.api.app import create_app
from bonsai_lora.settings import Settings


def render() -> str:
    """Return the OpenAPI document as JSON text."""
    document = create_app(Settings(store="memory:", no_auth=True)).openapi()
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
