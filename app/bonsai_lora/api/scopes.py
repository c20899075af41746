"""Which scope each route needs. A route that is missing here cannot be added to the application."""

import re
from collections.abc import Mapping
from typing import Literal

from bonsai_lora.service.keys import Scope

OPEN: Literal["open"] = "open"
"""Needs no key."""
SIGNED: Literal["signed"] = "signed"
"""Needs a signature in place of a key; the route checks it, and the key that asked for it."""

Need = Scope | Literal["open", "signed"]

_SET = "/v1/sets/{set}"
_ADAPTER = "/v1/sets/{set}/adapters/{module}"
_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"
_HUB = "/api/models/{owner}/{name}"
_LFS = "/adapters/{name}.git/info/lfs/objects"
_MEMORY = "/v2/systemsharedmemory"

SCOPES: Mapping[Need, Mapping[str, tuple[str, ...]]] = {
    OPEN: {
        "GET": (
            "/",
            "/docs",
            "/page/{path:path}",
            "/openapi.json",
            "/healthz",
            "/readyz",
            "/v2/health/live",
            "/v2/health/ready",
        )
    },
    SIGNED: {"PUT": (f"{_LFS}/{{oid}}",)},
    "read": {
        "GET": (
            "/v1/sets",
            _SET,
            f"{_SET}/adapter_config.json",
            f"{_SET}/adapter_model.safetensors",
            f"{_SET}/adapter.gguf",
            f"{_SET}/adapters",
            f"{_SET}/stats",
            f"{_SET}/spectrum",
            _ADAPTER,
            "/v1/stats",
            "/v1/compare",
            "/v1/estimate",
            "/v1/models",
            "/v1/jobs",
            "/v1/jobs/{job}",
            "/v1/bases",
            "/v1/bases/{base}",
            "/v1/bases/{base}/merged/{set}",
            "/v1/bases/{base}/survival/{set}",
            "/v1/bases/{base}/merged/{set}/{filename:path}",
            "/v2",
            "/v2/",
            "/v2/models/stats",
            *(
                f"{path}{ending}"
                for path in (_MODEL, _VERSION)
                for ending in ("", "/ready", "/config", "/stats")
            ),
            "/api/models",
            _HUB,
            f"{_HUB}/revision/{{revision}}",
            f"{_HUB}/tree/{{revision}}",
            f"{_HUB}/tree/{{revision}}/{{path:path}}",
            f"{_HUB}/refs",
            f"{_HUB}/commits/{{revision}}",
            f"{_HUB}/auth-check",
            "/api/whoami-v2",
            "/{owner}/{name}/resolve/{revision}/{path:path}",
        ),
        "POST": (
            "/v1/bases/{base}/survival/{set}",
            "/v2/repository/index",
            f"{_HUB}/paths-info/{{revision}}",
        ),
        "DELETE": ("/v1/jobs/{job}",),
    },
    "apply": {
        "POST": (
            "/v1/apply",
            f"{_SET}/apply",
            f"{_ADAPTER}/apply",
            f"{_ADAPTER}/merge",
            f"{_MODEL}/infer",
            f"{_VERSION}/infer",
        )
    },
    "write": {
        "POST": (
            "/v1/sets",
            "/v1/combine",
            "/v1/extract",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/load_lora_adapter",
            "/unload_lora_adapter",
            "/api/repos/create",
            "/api/validate-yaml",
            f"{_HUB}/preupload/{{revision}}",
            f"{_HUB}/commit/{{revision}}",
            f"{_LFS}/batch",
        ),
        "PUT": (_SET, _ADAPTER),
        "PATCH": (_SET,),
        "DELETE": (_SET, _ADAPTER),
    },
    "admin": {
        "GET": ("/metrics", f"{_MEMORY}/status", f"{_MEMORY}/region/{{region}}/status"),
        "POST": (
            "/v2/repository/models/{model}/load",
            "/v2/repository/models/{model}/unload",
            f"{_MEMORY}/unregister",
            f"{_MEMORY}/region/{{region}}/register",
            f"{_MEMORY}/region/{{region}}/unregister",
        ),
    },
}

_NEEDS: Mapping[tuple[str, str], Need] = {
    (method, path.replace(":path", "")): need
    for need, methods in SCOPES.items()
    for method, paths in methods.items()
    for path in paths
}

_OPEN_PATHS = frozenset(path for path in SCOPES[OPEN]["GET"] if "{" not in path)
_OPEN_FOLDER = "/page/"
_SIGNED_PATH = re.compile(r"/adapters/[^/]+\.git/info/lfs/objects/[^/]+")
_HEALTH_PATHS = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})


def scope_of(method: str, path: str) -> Need:
    """Return what the route at `path`, a template, needs; raises KeyError for an unknown one."""
    return _NEEDS["GET" if method == "HEAD" else method, path.replace(":path", "")]


def is_open(path: str) -> bool:
    """Return whether a request's path needs no key."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)


def is_signed(method: str, path: str) -> bool:
    """Return whether a request has a signature in place of a key."""
    return method == "PUT" and _SIGNED_PATH.fullmatch(path) is not None


def is_health(path: str) -> bool:
    """Return whether a request's path is a health check, which any host name may be used for."""
    return path in _HEALTH_PATHS
