"""`bonsai-lora serve`: one flag per setting, then uvicorn."""

import argparse
import logging
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from pydantic import ValidationError

from app.api.app import create_app
from app.cli.logs import configure_logging
from app.settings import Settings


def add_command(commands: Any) -> None:
    """Add the command with its flags, made from the settings."""
    parser = commands.add_parser(
        "serve",
        help="serve the HTTP API",
        description="Serve the HTTP API. Each flag is also a variable: --max-rows is "
        "BONSAI_LORA_MAX_ROWS. A flag beats the variable.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory else f" (default: {field.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{field.description}{default}",
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0, or 2 for a wrong setting."""
    given = {
        name: value for name, value in vars(arguments).items() if name in Settings.model_fields
    }
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for one in error.errors():
            print(f"bonsai-lora: setting {one['loc'][0]}: {one['msg']}", file=sys.stderr)
        return 2
    configure_logging(settings.log_level, settings.log_format)
    try:
        app = create_app(settings)
    except OSError as error:
        print(f"bonsai-lora: the store cannot be opened: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        server_header=False,
    )
    logging.getLogger("app").info("store: %s", settings.store)
    # uvicorn raises the signal that ended it once more, for the handler that was there before.
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _exit)
    uvicorn.Server(config).run()
    return 0


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
