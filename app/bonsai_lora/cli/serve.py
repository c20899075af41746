"""The `serve` command: one flag per setting, then supervised workers that run uvicorn."""

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections import Counter
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import uvicorn
from fastapi import FastAPI
from prometheus_client import values

from bonsai_lora.api.connection import GuardedProtocol
from bonsai_lora.api.keys_file import read_keys
from bonsai_lora.api.metrics import inherit_counters
from bonsai_lora.api.sources_file import read_sources
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.cli.accept import Server
from bonsai_lora.cli.listen import ListenError, address_of, listening
from bonsai_lora.cli.logs import configure_logging
from bonsai_lora.cli.output import EXIT_USAGE, failed, plain
from bonsai_lora.cli.supervisor import Supervisor, end_by_signals
from bonsai_lora.cli.temporary import temporary_folder
from bonsai_lora.client.connection import TOKEN_VARIABLE, URL_VARIABLE
from bonsai_lora.errors import BonsaiLoraError, StoreUnreachableError
from bonsai_lora.formats.peft_config import CONFIG_FILE
from bonsai_lora.service.budget import Budget
from bonsai_lora.service.view import SetView
from bonsai_lora.settings import UNGUARDED, Settings, SettingsError, read_settings
from bonsai_lora.storage.cache_folder import claim, release_all
from bonsai_lora.storage.counts import count_restart
from bonsai_lora.storage.in_use import suspect_sets_of
from bonsai_lora.storage.store import SetStore

_log = logging.getLogger("bonsai_lora")

_MAPPED_BYTES = 8 << 20
"""Blocks up to this size are allocated from the heap; larger ones are mapped and unmapped."""
_KEPT_BYTES = 256 << 20
"""Most free memory kept at the end of the heap."""
_SWITCH_SECONDS = 5e-4
"""How long a thread may run Python code while others wait for their turn."""
_COLLECTIONS = 1000
"""Collections of younger objects before one of all, which is 7 million new objects."""
_NAMED = 32
"""Most sets named in a log line."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting."""
    parser.description = (
        "Serve the HTTP API. Each flag has an environment variable: --max-rows is "
        "BONSAI_LORA_MAX_ROWS. Flags take precedence. Sizes are in bytes."
    )
    for name, field in Settings.model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
        is_switch = field.annotation is bool
        has_default = not (is_switch or field.default_factory or field.default in (None, "", ()))
        default = f" (default: {field.default})" if has_default else ""
        more: dict[str, Any] = {"nargs": "?", "const": "true"} if is_switch else {}
        if get_origin(field.annotation) is tuple:
            more = {"nargs": "+"}
        shown = "{" + ",".join(choices) + "}" if choices else name.rpartition("_")[2].upper()
        parser.add_argument(
            _flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            **more,
            metavar="true|false" if is_switch else shown,
            help=f"{field.description}{default}",
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the service; return 0, or 2 if the service cannot start."""
    given: dict[str, Any] = {
        name: ",".join(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in Settings.model_fields
    }
    try:
        settings = read_settings(**given)
    except SettingsError as error:
        return failed(str(error))
    end_by_signals()
    configure_logging(settings.log_level, settings.log_format)
    try:
        settings = _guarded(settings)
    except ValueError as error:
        return failed(str(error))
    _warn_of_unknown_variables()
    if settings.bases:
        _warn_of_bases(Path(settings.bases))
    _raise_file_limit()
    try:
        with listening(settings) as listeners, temporary_folder() as temporary:
            if settings.store_folder() is None:
                settings = settings.model_copy(update={"store": str(temporary)})
            return _serve(settings, listeners, temporary)
    except ListenError as error:
        return failed(str(error))


def _guarded(settings: Settings) -> Settings:
    """Return `settings` with `no_auth` where only this machine can connect.

    Raises ValueError if other machines can, without keys or leave, for a certificate that cannot be
    used, and for bad keys or sources.
    """
    if settings.tls_cert is not None:
        _check_certificate(settings.tls_cert, settings.tls_key)
    read_sources(settings.sources)
    if settings.keys_file is not None:
        read_keys(settings.keys_file)
    elif not settings.no_auth and settings.is_reachable():
        raise ValueError(f"other machines can reach {settings.host}, and {UNGUARDED}")
    else:
        return settings.model_copy(update={"no_auth": True})
    return settings


def _check_certificate(certificate: Path, key: Path | None) -> None:
    for flag, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:  # that of `load_cert_chain` does not name the file
            raise ValueError(
                f"the file {path} cannot be read: {error.strerror}; check {flag}"
            ) from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except OSError as error:  # an SSLError is one
        raise ValueError(
            f"the certificate {certificate} and the key {key} cannot be used: {error}; check "
            "--tls-cert and --tls-key"
        ) from error


def make_app(settings: Settings, shared: Path) -> FastAPI:
    """Return the application of a worker."""
    from bonsai_lora.api.app import create_app  # noqa: PLC0415 - slow to import

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


def _serve(settings: Settings, listeners: list[socket.socket], temporary: Path) -> int:
    try:
        _check_store(settings)
    except (OSError, ValueError) as error:
        return failed(str(error))
    # prometheus_client keeps the workers' metrics here: each reports all of them, and they outlive
    # a worker that is replaced.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(temporary)
    # It was imported before the variable was set.
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]
    from bonsai_lora.api.app import choose_backend  # noqa: PLC0415 - slow to import

    keep_freed_memory()
    choose_backend(settings)  # once for all workers
    if settings.sets is not None and not _import_sets(settings):
        return EXIT_USAGE
    scheme = "http" if settings.tls_cert is None else "https"
    addresses = " and ".join(address_of(one, scheme) for one in listeners)
    place = settings.store if settings.is_bucket else Path(settings.store).resolve()
    _log.info("serving on %s, sets in %s", addresses, place)
    died: list[int] = []
    work = partial(_work, settings, listeners, temporary, os.getpid(), died)
    return Supervisor(work, settings.workers, partial(_note_death, temporary, died)).run()


def _import_sets(settings: Settings) -> bool:
    """Import the adapters of the folder `sets`; return whether the folder could be read.

    In a process of its own, as an open store may have threads and locks, which workers must not
    inherit.
    """
    importer = get_context("fork").Process(target=_import_folder, args=(settings,), daemon=True)
    importer.start()
    importer.join()
    return importer.exitcode == 0


def _import_folder(settings: Settings) -> None:
    """Import the adapters of the folder `sets`, and log what became of them; exit 2 on errors.

    Without the bucket, the service starts nevertheless, as it does without `sets`.
    """
    _exit_with(os.getppid())
    try:
        _import_each(settings, cast("Path", settings.sets))
    except StoreUnreachableError as error:
        _log.error("the sets of %s wait for the next start: %s", settings.sets, error.detail)
    except (OSError, ValueError, BonsaiLoraError) as error:
        sys.exit(
            failed(f"the sets of {settings.sets} cannot be imported: {plain(error)}; check --sets")
        )


def _import_each(settings: Settings, folder: Path) -> None:
    from bonsai_lora.api.app import limits_of, open_store  # noqa: PLC0415 - slow to import
    from bonsai_lora.service.sets_folder import import_folder  # noqa: PLC0415 - loads NumPy

    inside = Path(settings.cache if settings.is_bucket else settings.store).resolve()
    if folder.resolve().is_relative_to(inside) or inside.is_relative_to(folder.resolve()):
        raise OSError(f"it shares a folder with the store {inside}")
    store = SetView(open_store(settings), limits_of(settings))
    memory = Budget(settings.work_memory_bytes)
    bases = BaseFolder(Path(settings.bases) if settings.bases else None)
    outcomes: Counter[str] = Counter()
    for one in import_folder(store, memory, bases, folder):
        outcomes[one.outcome] += 1
        if one.outcome == "refused":
            _log.error("the adapter %r in %s is refused: %s", one.name, folder, one.reason)
        for warning in one.warnings:
            _log.warning("the adapter %r in %s: %s", one.name, folder, warning)
    if (folder / CONFIG_FILE).is_file():
        _log.warning("the folder %s is itself an adapter; give --sets the folder around it", folder)
    counts = [f"{outcomes[outcome]} {outcome}" for outcome in ("imported", "unchanged", "refused")]
    _log.info("sets of %s: %s", folder, ", ".join(counts))


def _check_store(settings: Settings) -> None:
    """Raise OSError or ValueError if the store cannot be opened; warn if it is read-only."""
    if settings.is_bucket:
        claim(Path(settings.cache), settings.store)
        release_all(Path(settings.cache))
        return
    try:
        if not SetStore(Path(settings.store)).is_writable():
            _log.warning("the store %s is read-only; sets cannot be changed", settings.store)
    except OSError as error:
        raise OSError(
            f"the store {settings.store!r} cannot be opened: {plain(error)}; choose another "
            "folder with --store"
        ) from error


def _work(
    settings: Settings,
    listeners: list[socket.socket],
    shared: Path,
    supervisor: int,
    died: list[int],
) -> None:
    """Serve in this process, a worker of the process `supervisor`, in place of those that died."""
    _exit_with(supervisor)
    for pid in died:
        inherit_counters(shared, pid)
    app = make_app(settings, shared)
    _collect_rarely()
    # The event loop releases the interpreter at each system call, and gets it back only after
    # this time if a thread is busy: 5 ms by default, and several times a request.
    sys.setswitchinterval(_SWITCH_SECONDS)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        server_header=False,
        http=connection_class(settings),
        ws="none",
        proxy_headers=False,  # api/auth.py reads what trusted proxies say
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    stopping = app.state.context.stopping
    server = Server(config, settings.stall_seconds, settings.drain_seconds, stopping.set)
    server.run(sockets=listeners)


def _note_death(shared: Path, died: list[int], pid: int) -> None:
    """Count a worker that died, and log its open sets; they are checked before their next use.

    The next worker finds it in `died`.
    """
    count_restart(shared)
    died[:] = [pid]
    names = suspect_sets_of(shared, pid)
    if names:
        _log.warning(
            "worker %d had %d sets open, which are checked on next use: %s",
            pid,
            len(names),
            ", ".join(names[:_NAMED]),
        )


def _exit_with(supervisor: int) -> None:
    """Make the kernel send SIGTERM to this worker when its supervisor exits (prctl(2))."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != supervisor:  # it has exited already
        sys.exit(0)


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks instead of mapping and unmapping each one (mallopt(3)).

    Otherwise a body of 4 MiB costs a thousand page faults (benchmarks/throughput.py).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, _MAPPED_BYTES)
        mallopt(m_trim_threshold, _KEPT_BYTES)


def _collect_rarely() -> None:
    """Make Python look through all objects for garbage a hundredth as often.

    Each time stops all threads, for 0.3 s once a set of 32,000 modules is open; half the time of an
    upload of such a set went into it. Reference counts free almost everything without it.
    """
    gc.freeze()  # what there is now stays
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _COLLECTIONS)


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


def _warn_of_bases(folder: Path) -> None:
    """Log it if there is no folder of bases, or if the folder of a single one was given."""
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        _log.warning("the folder of bases %s %s; check --bases", folder, found)
        return
    with contextlib.suppress(PermissionError):
        if any(folder.glob("*.safetensors")) and not BaseFolder(folder).names():
            _log.warning(
                "the folder of bases %s is itself a model; give --bases the folder around it",
                folder,
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
