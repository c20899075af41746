"""The entry point of the `bonsai-lora` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

# Requests run in parallel, so NumPy's matrix products (used by statistics) get one thread each.
# OpenBLAS reads this variable when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bonsai_lora.cli import client


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="bonsai-lora", description="The adapter server for Bonsai and Qwen3 models."
    )
    parser.add_argument("--version", action="version", version=version("bonsai-lora"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands, is_chosen=words[:1] == ["serve"])
    _add_verify(commands, is_chosen=words[:1] == ["verify"])
    client.add_commands(commands)
    chosen = parser.parse_args(words)
    code: int = chosen.run(chosen)
    return code


def _add_serve(commands: Any, *, is_chosen: bool) -> None:
    """Add `serve`; the server is imported only if the command is used."""
    parser = commands.add_parser("serve", help="serve the HTTP API")
    if is_chosen:
        from bonsai_lora.cli import serve  # noqa: PLC0415 - the other commands start without it

        serve.add_flags(parser)


def _add_verify(commands: Any, *, is_chosen: bool) -> None:
    """Add `verify`; the store is imported only if the command is used."""
    parser = commands.add_parser("verify", help="check the files of a store")
    if is_chosen:
        from bonsai_lora.cli import verify  # noqa: PLC0415 - the other commands start without it

        verify.add_arguments(parser)


if __name__ == "__main__":
    sys.exit(main())
