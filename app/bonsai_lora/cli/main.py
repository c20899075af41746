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

from bonsai_lora.cli import client, lab


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="bonsai-lora", description="The adapter server for Bonsai and Qwen3 models."
    )
    parser.add_argument("--version", action="version", version=version("bonsai-lora"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_local(commands, list(words[:1]))
    client.add_commands(commands)
    lab.add_commands(commands)
    chosen = parser.parse_args(words)
    code: int = chosen.run(chosen)
    return code


def _add_local(commands: Any, chosen: list[str]) -> None:
    """Add `serve`, `verify` and `keys`; what one imports is imported only if it is used."""
    parser = commands.add_parser("serve", help="serve the HTTP API")
    if chosen == ["serve"]:
        from bonsai_lora.cli import serve  # noqa: PLC0415 - the other commands start without it

        serve.add_flags(parser)
    parser = commands.add_parser("verify", help="check the files of a store")
    if chosen == ["verify"]:
        from bonsai_lora.cli import verify  # noqa: PLC0415 - the same

        verify.add_arguments(parser)
    parser = commands.add_parser("keys", help="make, list and remove the keys of a service")
    if chosen == ["keys"]:
        from bonsai_lora.cli import keys  # noqa: PLC0415 - the same

        keys.add_flags(parser)


if __name__ == "__main__":
    sys.exit(main())
