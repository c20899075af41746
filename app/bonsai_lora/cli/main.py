"""`bonsai-lora`: the command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

# Requests are what runs in parallel here, so what NumPy multiplies (statistics) takes one thread.
# OpenBLAS reads this when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bonsai_lora.cli import client


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="bonsai-lora", description="The adapter server for Bonsai and Qwen3 models."
    )
    parser.add_argument("--version", action="version", version=version("bonsai-lora"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands, is_chosen=words[:1] == ["serve"])
    client.add_commands(commands)
    chosen = parser.parse_args(words)
    code: int = chosen.run(chosen)
    return code


def _add_serve(commands: Any, *, is_chosen: bool) -> None:
    """Add `serve`; its flags and the server behind them are imported only where it is chosen."""
    parser = commands.add_parser("serve", help="serve the HTTP API")
    if is_chosen:
        from bonsai_lora.cli import serve  # noqa: PLC0415 - the other commands need nothing of it

        serve.add_flags(parser)


if __name__ == "__main__":
    sys.exit(main())
