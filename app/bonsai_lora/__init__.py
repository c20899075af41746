"""Bonsai LoRA: the adapter server for Bonsai and Qwen3 models, and its NumPy core as a library.

The public names are imported on first use, so that the command can configure BLAS threads before
NumPy is loaded, and the command-line client starts without loading the core or the web framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bonsai_lora.core.adapter import LoraAdapter
    from bonsai_lora.core.config import LoraConfig
    from bonsai_lora.core.loraset import BonsaiLoraSet
    from bonsai_lora.core.registry import LoraRegistry

    __version__: str

__all__ = ["BonsaiLoraSet", "LoraAdapter", "LoraConfig", "LoraRegistry", "__version__"]

_MODULES = {
    "BonsaiLoraSet": "bonsai_lora.core.loraset",
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
    return sorted({*globals(), *__all__})
