"""The `serve` command: one flag per setting, then uvicorn."""

import argparse
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, get_args, get_origin

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from uvicorn.supervisors import Multiprocess

from bonsai_lora.api.connection import GuardedProtocol
from bonsai_lora.cli.listen import ListenError, address_of, listening
from bonsai_lora.cli.logs import configure_logging
from bonsai_lora.client.connection import TOKEN_VARIABLE, URL_VARIABLE
from bonsai_lora.settings import Settings
from bonsai_lora.storage.store import SetStore

_log = logging.getLogger("bonsai_lora")

_MAPPED_BYTES = 8 << 20
"""Blocks up to this size are allocated from the heap; larger ones are mapped and unmapped."""
_KEPT_BYTES = 256 << 20
"""Most free memory kept at the end of the heap."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting."""
    parser.description = (
        "Serve the HTTP API. Each flag has an environment variable: --max-rows is "
        "BONSAI_LORA_MAX_ROWS. Flags take precedence. Sizes are in bytes."
    )
    for name, field in Settings.model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
        is_switch = field.annotation is bool
        has_default = not (is_switch or field.default_factory or field.default is None)
        default = f" (default: {field.default})" if has_default else ""
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if is_switch else {}
        parser.add_argument(
            _flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            **switch,
            metavar="{" + ",".join(choices) + "}" if choices else name.rpartition("_")[2].upper(),
            help=f"{field.description}{default}",
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0, or 2 if the service cannot start."""
    given = {
        name: value for name, value in vars(arguments).items() if name in Settings.model_fields
    }
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for one in error.errors():
            name = str(one["loc"][0])
            variable = f"BONSAI_LORA_{name.upper()}"
            _print_error(f"{_flag(name)} ({variable}): {one['msg']}; got {one['input']!r}")
        return 2
    configure_logging(settings.log_level, settings.log_format)
    _warn_of_unknown_variables()
    if settings.bases and not Path(settings.bases).is_dir():
        _log.warning("the folder of bases %s does not exist; check --bases", settings.bases)
    _raise_file_limit()
    try:
        with (
            listening(settings) as listeners,
            tempfile.TemporaryDirectory(prefix="bonsai-lora-") as temporary,
        ):
            if settings.store_folder() is None:
                settings = settings.model_copy(update={"store": temporary})
            return _serve(settings, listeners, temporary)
    except ListenError as error:
        _print_error(str(error))
        return 2


def make_app(settings: Settings, shared: Path, supervisor: int | None) -> FastAPI:
    """Return the application, for this process or for a worker of the process `supervisor`."""
    configure_logging(settings.log_level, settings.log_format)
    _keep_freed_memory()
    if supervisor is not None:
        _exit_with(supervisor)
    from bonsai_lora.api.app import create_app  # noqa: PLC0415 - reads PROMETHEUS_MULTIPROC_DIR

    app = create_app(settings, shared)
    install_fast_lane(app, settings)
    return app


def has_fast_lane(settings: Settings) -> bool:
    """Return whether the fast lane is enabled and installed."""
    return settings.fast_lane == "auto" and find_spec("bonsai_lora.fast_lane") is not None


def install_fast_lane(app: FastAPI, settings: Settings) -> None:
    """Create the state that fast-lane connections of `app` share, if the fast lane is enabled."""
    if has_fast_lane(settings):
        from bonsai_lora.fast_lane.routes import FastLane  # noqa: PLC0415 - optional package

        app.state.fast_lane = FastLane(app)


def connection_class(settings: Settings) -> Any:
    """Return the protocol class that uvicorn instantiates for each connection."""
    if has_fast_lane(settings):
        from bonsai_lora.fast_lane.protocol import LaneConnection  # noqa: PLC0415

        return LaneConnection
    return GuardedProtocol


def _serve(settings: Settings, listeners: list[socket.socket], temporary: str) -> int:
    if settings.workers > 1:
        # prometheus_client shares the workers' metrics here, so that each can report all of them.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = temporary
    config = uvicorn.Config(
        partial(make_app, settings, Path(temporary), os.getpid() if settings.workers > 1 else None),
        factory=True,
        workers=settings.workers,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        server_header=False,
        http=connection_class(settings),
        ws="none",
        proxy_headers=False,  # client addresses are not used
    )
    server = uvicorn.Server(config)
    try:
        if not SetStore(Path(settings.store)).is_writable():
            _log.warning("the store %s is read-only; sets cannot be changed", settings.store)
        # After shutdown, uvicorn raises the signal again for the previously installed handler.
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, _exit)
        if settings.workers == 1:
            config.load()
    except OSError as error:
        _print_error(
            f"the store {settings.store!r} cannot be opened: {error}; choose another folder with "
            "--store"
        )
        return 2
    addresses = " and ".join(address_of(one) for one in listeners)
    _log.info("serving on %s, sets in %s", addresses, Path(settings.store).resolve())
    if settings.workers == 1:
        server.run(sockets=listeners)
    else:
        Multiprocess(config, sockets=listeners).run()
    return 0


def _exit_with(supervisor: int) -> None:
    """Make the kernel send SIGTERM to this worker when its supervisor exits (prctl(2))."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != supervisor:  # it has exited already
        sys.exit(0)


def _keep_freed_memory() -> None:
    """Make glibc reuse large blocks instead of mapping and unmapping each one (mallopt(3)).

    Otherwise a body of 4 MiB costs a thousand page faults (benchmarks/throughput.py).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, _MAPPED_BYTES)
        mallopt(m_trim_threshold, _KEPT_BYTES)


def _raise_file_limit() -> None:
    """Raise the limit of open files to its maximum: each open set takes a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS reports "unlimited" but does not accept it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _warn_of_unknown_variables() -> None:
    known = {f"BONSAI_LORA_{name.upper()}" for name in Settings.model_fields}
    known |= {URL_VARIABLE, TOKEN_VARIABLE}  # read by the client
    for name in sorted(os.environ):
        if name.startswith("BONSAI_LORA_") and name not in known:
            _log.warning("%s is not a setting; see bonsai-lora serve --help", name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _print_error(text: str) -> None:
    print(f"bonsai-lora: {text}", file=sys.stderr)


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
