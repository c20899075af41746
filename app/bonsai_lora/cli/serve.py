"""`bonsai-lora serve`: one flag per setting, then uvicorn."""

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
from bonsai_lora.core.crew import set_threads
from bonsai_lora.core.json_numbers import prepare
from bonsai_lora.kernels.target import may_run_new_code
from bonsai_lora.settings import Settings, usable_cores
from bonsai_lora.storage.store import SetStore

_log = logging.getLogger("bonsai_lora")

_MAPPED_BYTES = 8 << 20
"""Blocks up to this size come from the heap and stay; larger ones are given back."""
_KEPT_BYTES = 256 << 20
"""Most free memory at the heap's end that is kept."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags, made from the settings."""
    parser.description = (
        "Serve the HTTP API. Each flag is also a variable: --max-rows is BONSAI_LORA_MAX_ROWS. "
        "A flag beats the variable. Sizes are in bytes."
    )
    for name, field in Settings.model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
        default = "" if field.default_factory or field.default is None else f" ({field.default})"
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
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
    """Serve until SIGTERM or SIGINT; return 0, or 2 where it cannot begin."""
    given = {
        name: value for name, value in vars(arguments).items() if name in Settings.model_fields
    }
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for one in error.errors():
            name = str(one["loc"][0])
            variable = f"BONSAI_LORA_{name.upper()}"
            _complain(f"{_flag(name)} ({variable}): {one['msg']}, got {one['input']!r}")
        return 2
    configure_logging(settings.log_level, settings.log_format)
    _warn_of_unknown_variables()
    _raise_file_limit()
    if not may_run_new_code():
        _complain(
            "this system forbids memory to become executable, and products are computed by machine "
            "code that is made here; allow it (systemd: MemoryDenyWriteExecute=no)"
        )
        return 2
    cores = usable_cores()
    if settings.apply_threads > 1 and settings.apply_threads * settings.workers > cores:
        _log.warning("apply_threads times workers is over %s cores: applies will wait", cores)
    try:
        with (
            listening(settings) as listeners,
            tempfile.TemporaryDirectory(prefix="bonsai-lora-") as temporary,
        ):
            if settings.store_folder() is None:
                settings = settings.model_copy(update={"store": temporary})
            return _serve(settings, listeners, temporary)
    except ListenError as error:
        _complain(str(error))
        return 2


def make_app(settings: Settings, shared: Path, supervisor: int | None) -> FastAPI:
    """Return the application, in this process or in a worker of the process `supervisor`."""
    configure_logging(settings.log_level, settings.log_format)
    _keep_freed_memory()
    set_threads(settings.apply_threads)
    prepare()
    if supervisor is not None:
        _end_with(supervisor)
    from bonsai_lora.api.app import create_app  # noqa: PLC0415 - after the metrics' folder is known

    app = create_app(settings, shared)
    install_fast_lane(app, settings)
    return app


def has_fast_lane(settings: Settings) -> bool:
    """Return whether the hottest routes are called without the framework."""
    return settings.fast_lane == "auto" and find_spec("bonsai_lora.fast_lane") is not None


def install_fast_lane(app: FastAPI, settings: Settings) -> None:
    """Give the connections of `app` what they share, where they use the fast lane."""
    if has_fast_lane(settings):
        from bonsai_lora.fast_lane.routes import FastLane  # noqa: PLC0415 - it can be taken out

        app.state.fast_lane = FastLane(app)


def connection_class(settings: Settings) -> Any:
    """Return the class that uvicorn makes for each connection."""
    if has_fast_lane(settings):
        from bonsai_lora.fast_lane.protocol import LaneConnection  # noqa: PLC0415

        return LaneConnection
    return GuardedProtocol


def _serve(settings: Settings, listeners: list[socket.socket], temporary: str) -> int:
    if settings.workers > 1:
        # Where prometheus_client keeps what the workers count, so that any of them can tell it all.
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
        proxy_headers=False,  # nothing here asks who the caller is
    )
    server = uvicorn.Server(config)
    try:
        SetStore(Path(settings.store))
        # uvicorn raises the signal that ended it once more, for the handler that was there before.
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, _exit)
        if settings.workers == 1:
            config.load()
    except OSError as error:
        _complain(f"the store {settings.store!r} cannot be opened: {error}")
        return 2
    addresses = " and ".join(address_of(one) for one in listeners)
    _log.info("serving on %s, sets in %s", addresses, Path(settings.store).resolve())
    if settings.workers == 1:
        server.run(sockets=listeners)
    else:
        Multiprocess(config, sockets=listeners).run()
    return 0


def _end_with(supervisor: int) -> None:
    """Let a worker get SIGTERM when its supervisor is gone, however that ended (prctl(2))."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != supervisor:  # it was gone before
        sys.exit(0)


def _keep_freed_memory() -> None:
    """Let glibc give large blocks out again instead of mapping and unmapping each (mallopt(3)).

    A body of 4 MiB costs a thousand page faults otherwise: benchmarks/throughput.py.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, _MAPPED_BYTES)
        mallopt(m_trim_threshold, _KEPT_BYTES)


def _raise_file_limit() -> None:
    """Let the process open as many files as it may: each opened set takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS calls it unlimited and takes no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _warn_of_unknown_variables() -> None:
    known = {f"BONSAI_LORA_{name.upper()}" for name in Settings.model_fields}
    known |= {URL_VARIABLE, TOKEN_VARIABLE}  # the client's
    for name in sorted(os.environ):
        if name.startswith("BONSAI_LORA_") and name not in known:
            _log.warning("%s is no setting; see bonsai-lora serve --help", name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _complain(text: str) -> None:
    print(f"bonsai-lora: {text}", file=sys.stderr)


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
