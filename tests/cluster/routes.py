"""All routes that name a set."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OPENAPI = json.loads((ROOT / "openapi/openapi.json").read_text())
HUB = [
    "/api/models/adapters/{set}",
    "/api/models/adapters/{set}/revision/main",
    "/api/models/adapters/{set}/tree/main",
    "/api/models/tiny-qwen3/{set}",
    "/adapters/{set}/resolve/main/adapter_config.json",
    "/adapters/{set}/resolve/main/adapter_model.safetensors",
    "/tiny-qwen3/{set}/resolve/main/model.safetensors",
    "/adapters/{set}.git/info/lfs/objects/batch",
    f"/adapters/{{set}}.git/info/lfs/objects/{'0' * 64}",
]


def routes():
    """Each route that names a set in its path, as (method, path with `{set}`)."""
    for path, operations in OPENAPI["paths"].items():
        named = path.replace("{model}", "{set}").replace("{base}", "tiny-qwen3")
        named = named.replace("{module}", "model.layers.0.self_attn.q_proj")
        named = named.replace("{version}", "1").replace("{filename}", "model.safetensors")
        if "{set}" in named:
            yield from ((method.upper(), named) for method in operations)
    yield from (("GET", path) for path in HUB)
