"""`bonsai-lora`: the command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

# Requests are what runs in parallel here, so what NumPy multiplies (statistics) takes one thread.
# OpenBLAS reads this when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bonsai_lora.cli import client, serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="bonsai-lora", description="The adapter server for Bonsai and Qwen3 models."
    )
    parser.add_argument("--version", action="version", version=version("bonsai-lora"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve.add_command(commands)
    client.add_commands(commands)
    chosen = parser.parse_args(arguments)
    code: int = chosen.run(chosen)
    return code


if __name__ == "__main__":
    sys.exit(main())
