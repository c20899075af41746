"""The entry point of the `bonsai-lora` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

# Requests run in parallel, so NumPy's matrix products (used by statistics) get one thread each.
# OpenBLAS reads this variable when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bonsai_lora.cli import client, lab

_LOCAL = {
    "serve": ("serve", "add_flags", "serve the HTTP API"),
    "verify": ("verify", "add_arguments", "check the files of a store"),
    "backup": ("store", "add_backup", "copy a store, which may be in use, to a folder"),
    "restore": ("store", "add_restore", "add the sets of a backup to a store"),
    "gc": ("store", "add_gc", "remove leftovers and old bad files from a store"),
    "keys": ("keys", "add_flags", "make, list and remove the keys of a service"),
}
"""Module, function that adds the arguments, and help of each command that needs no service."""

_OF_COMMANDS = frozenset(("--url", "--uds", "--header", "--json", "--store", "--keys-file"))
"""Flags that belong to a command, which people expect in front of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="bonsai-lora",
        description="The adapter server for Bonsai and Qwen3 models.",
        epilog="The commands from ls on call a running service; those before it need none. "
        "`bonsai-lora COMMAND --help` explains each.",
    )
    parser.add_argument("--version", action="version", version=version("bonsai-lora"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_local(commands, list(words[:1]))
    client.add_commands(commands)
    lab.add_commands(commands)
    if words and words[0].partition("=")[0] in _OF_COMMANDS:
        parser.error(f"put {words[0].partition('=')[0]} after the command")
    chosen = parser.parse_args(words)
    code: int = chosen.run(chosen)
    return code


def _add_local(commands: Any, chosen: list[str]) -> None:
    """Add the commands that need no service; what one imports is imported only if it is used."""
    for command, (module, function, text) in _LOCAL.items():
        parser = commands.add_parser(command, help=text)
        if chosen == [command]:
            getattr(import_module(f"bonsai_lora.cli.{module}"), function)(parser)


if __name__ == "__main__":
    sys.exit(main())
