"""Bonsai LoRA: the adapter server for Bonsai and Qwen3 models, its client, and its NumPy core.

The public names are imported on first use, so that the command can configure BLAS threads before
NumPy is loaded, and the command-line client starts without loading the core or the web framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bonsai_lora.client.asynchronous import AsyncClient
    from bonsai_lora.client.blocking import Client
    from bonsai_lora.client.layer import Layer
    from bonsai_lora.core.adapter import LoraAdapter
    from bonsai_lora.core.config import LoraConfig
    from bonsai_lora.core.loraset import BonsaiLoraSet
    from bonsai_lora.core.registry import LoraRegistry

    __version__: str

__all__ = [
    "AsyncClient",
    "BonsaiLoraSet",
    "Client",
    "Layer",
    "LoraAdapter",
    "LoraConfig",
    "LoraRegistry",
    "__version__",
]

_MODULES = {
    "AsyncClient": "bonsai_lora.client.asynchronous",
    "BonsaiLoraSet": "bonsai_lora.core.loraset",
    "Client": "bonsai_lora.client.blocking",
    "Layer": "bonsai_lora.client.layer",
    "LoraAdapter": "bonsai_lora.core.adapter",
    "LoraConfig": "bonsai_lora.core.config",
    "LoraRegistry": "bonsai_lora.core.registry",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("bonsai-lora")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'bonsai_lora' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
