"""What is wrong with the arguments of a command, and what to give instead."""

import argparse
from pathlib import Path

from bonsai_lora.errors import InvalidNameError
from bonsai_lora.formats.names import check_set_name, is_set_name

_CONFIG = "adapter_config.json"
_PICKLE = "adapter_model.bin"


class UsageError(ValueError):
    """The arguments are wrong; the message says what to give instead."""


def set_name(name: str) -> str:
    """Return `name`; raises UsageError unless it may be the name of a set."""
    if is_set_name(name):
        return name
    bare = name.removeprefix("adapters/")
    if bare != name and is_set_name(bare):
        raise UsageError(f"{name!r} is a repository; name the set alone: {bare}")
    try:
        return check_set_name(name)
    except InvalidNameError as error:
        raise UsageError(error.detail) from None


def check_output(arguments: argparse.Namespace) -> None:
    """Raise UsageError if `--output` is a folder and should be a file, or the reverse."""
    output = arguments.output
    if arguments.gguf and output.is_dir():
        raise UsageError(f"{output} is a folder; name a GGUF file, such as {output / 'model.gguf'}")
    if not arguments.gguf and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; name a folder")


def why_no_adapter(arguments: argparse.Namespace, missing: str) -> str:
    """Return what is wrong with the folder to push, which lacks the file `missing`."""
    folder = arguments.folder
    if not folder.exists():
        if Path(arguments.name).exists():
            return f"there is no folder {folder}; name the set first, then the folder"
        found = f"there is no file or folder {folder}"
    elif folder.is_file():
        if (folder.parent / _CONFIG).exists():
            return f"{folder} is a file; give the folder that it is in: {folder.parent}"
        found = f"{folder} is a file"
    elif missing != _CONFIG and (folder / _PICKLE).exists():
        return (
            f"{folder} has its weights in {_PICKLE}, a pickle, which is never loaded; save the "
            "adapter again with save_pretrained(folder, safe_serialization=True)"
        )
    elif missing == _CONFIG and (inner := sorted(folder.glob(f"*/{_CONFIG}"))):
        return (
            f"{folder} has no {_CONFIG}, but folders in it have; give one of them, such as "
            f"{inner[-1].parent}"
        )
    else:
        found = f"{folder} has no {missing}"
    return (
        f"{found}; give a folder saved by PEFT or mlx_lm, or a GGUF LoRA file, which ends in .gguf"
    )
