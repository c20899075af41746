"""The application factory.

A request passes through `ObserveMiddleware` (request id, metrics, log), a route in `routes/`
(which translates headers and bodies), and a use case in `bonsai_lora.service`. Errors become
RFC 9457 problems in `errors.py`. `bonsai-lora serve` calls the same functions of the hottest
routes without the framework (`bonsai_lora.fast_lane`).
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import anyio
import structlog
from fastapi import FastAPI
from prometheus_client.core import Metric
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from bonsai_lora.api.auth import Authenticator, AuthMiddleware
from bonsai_lora.api.context import Context
from bonsai_lora.api.errors import install_error_handlers
from bonsai_lora.api.metrics import Load, Metrics, service_metrics
from bonsai_lora.api.middleware import ObserveMiddleware, Observer
from bonsai_lora.api.openapi import install_openapi
from bonsai_lora.api.routing import ROUTER, ROUTES
from bonsai_lora.api.scopes import OPEN, scope_of
from bonsai_lora.api.sources_file import read_sources
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.core import backend
from bonsai_lora.errors import BonsaiLoraError, StoreFullError
from bonsai_lora.service.apply import Applier
from bonsai_lora.service.budget import Budget
from bonsai_lora.service.gain import Gains
from bonsai_lora.service.gguf_lora import CheckedFiles
from bonsai_lora.service.jobs import Jobs
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.merged import MergedModels
from bonsai_lora.service.models import load
from bonsai_lora.service.pull import Origins
from bonsai_lora.service.stats import store_stats
from bonsai_lora.service.view import SetView
from bonsai_lora.service.work import Lane, ShortLane
from bonsai_lora.settings import UNGUARDED, Settings, usable_cores
from bonsai_lora.storage.counts import CountFile, read_restarts
from bonsai_lora.storage.exponents import ExponentFolder
from bonsai_lora.storage.protocol import Store
from bonsai_lora.storage.regions import SharedRegions
from bonsai_lora.storage.store import SetStore
from bonsai_lora.storage.verify import BackgroundCheck

_DESCRIPTION = """\
Stores named sets of LoRA adapters for Bonsai and Qwen3 models, applies them to batches of vectors
alongside the base model, and streams merged weights. Tensors are sent as JSON or safetensors.
Errors are RFC 9457 problems with a stable `code`."""

_TAGS = [
    {"name": "sets", "description": "Named sets of adapters."},
    {"name": "adapters", "description": "The adapters of one set, by module."},
    {"name": "apply", "description": "Compute scaling · B·A·x for batches of vectors."},
    {"name": "merge", "description": "Compute W + scaling · B·A for streamed weights."},
    {
        "name": "merged checkpoints",
        "description": "Base checkpoints, and merged files computed as they are read.",
    },
    {
        "name": "open inference protocol",
        "description": "Sets as models of the Open Inference Protocol v2, with Triton's extensions "
        "for binary data, statistics, the model repository and shared memory.",
    },
    {"name": "statistics", "description": "Parameter counts, memory and norms."},
    {
        "name": "laboratory",
        "description": "Combine sets, compare them, extract them, and look at their singular "
        "values.",
    },
    {"name": "jobs", "description": "Work that goes on after the answer to its request."},
    {"name": "operations", "description": "Health and metrics."},
]
_CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_EXPOSED_HEADERS = (
    "Accept-Ranges",
    "Bonsai-Delta-Gain",
    "Content-Range",
    "ETag",
    "Inference-Header-Content-Length",
    "Location",
    "Preference-Applied",
    "Retry-After",
    "WWW-Authenticate",
    "X-Error-Code",
    "X-Repo-Commit",
    "X-Request-Id",
)
"""Headers that a script of an allowed origin may read."""
_MAINTENANCE_SECONDS = 15
_OPENING_THREADS = 32
"""Threads that wait for a bucket."""
_NAMED = 32
"""Most files named in a log line."""
_PUBLISH_SECONDS = 1.0
"""Oldest figures of a worker that another worker reports."""

_log = structlog.get_logger("bonsai_lora")


def create_app(settings: Settings, shared: Path | None = None) -> FastAPI:
    """Return the application for the store that `settings` names.

    Chooses the backend and compiles its kernels, so that the first apply is as fast as the second.
    `shared` is a folder that all workers of the service share while it runs; by default a temporary
    folder that is deleted with the application. Raises ValueError if there are neither keys nor
    `no_auth`, so that no server is open by accident, and KeysFileError.
    """
    if settings.keys_file is None and not settings.no_auth:
        raise ValueError(UNGUARDED)
    choose_backend(settings)
    store = open_store(settings, shared)
    store.on_open = BackgroundCheck(store.verify).add
    if shared is None:
        shared = _new_folder()
        _remove_with(store, shared)
    app = FastAPI(
        title="Bonsai LoRA",
        version=version("bonsai-lora"),
        summary="The adapter server for Bonsai and Qwen3 models.",
        description=_DESCRIPTION,
        license_info={"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        openapi_tags=_TAGS,
        redirect_slashes=False,
        docs_url=None,  # routes/page.py
        redoc_url=None,
        lifespan=_running,
    )
    app.state.fast_lane = None
    metrics = Metrics(partial(_collect, app, shared), partial(_read_load, app), store.state)
    app.state.store = store
    auth = Authenticator(settings, _make_context(settings, store, shared, metrics))
    app.state.authenticator = auth
    app.state.context = auth.visitor.context(OPEN)
    app.state.routes = _include_routes(app)
    install_error_handlers(app, app.state.routes)
    install_openapi(app, settings.root_path)
    app.add_middleware(AuthMiddleware, authenticator=auth)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=_CORS_METHODS,
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.state.observer = Observer(metrics)
    app.add_middleware(ObserveMiddleware, observer=app.state.observer, context=app.state.context)
    return app


@contextlib.asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    """Log when this process is ready and when it stops, and publish its load in between."""
    context: Context = app.state.context
    tasks = [
        asyncio.create_task(_publish_load(context.metrics)),
        asyncio.create_task(_maintain(app.state.store)),
    ]
    await anyio.to_thread.run_sync(_preload, context)
    sums = await anyio.to_thread.run_sync(context.store.all_sums)
    _log.info("ready", sets=sums.sets, pid=os.getpid())
    await anyio.to_thread.run_sync(_warn_of_dropped, context.store)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await context.jobs.stop()
        app.state.store.close()
        _log.info("stopped", pid=os.getpid())


def _preload(context: Context) -> None:
    """Load the sets that settings name, and log those that cannot be loaded."""
    for name in context.settings.preload:
        try:
            load(context.store.read(name))
            context.store.keep(name)
        except BonsaiLoraError as error:
            _log.warning("not preloaded", set=name, code=error.code, detail=error.detail)


def _warn_of_dropped(store: SetView) -> None:
    """Log what was put into the store's folder, from which no adapter is imported."""
    dropped = store.dropped()
    if dropped.count:
        _log.warning(
            "not imported from the store's folder; move it out, and use bonsai-lora push or --sets",
            count=dropped.count,
            names=dropped.names[:_NAMED],
        )


async def _publish_load(metrics: Metrics) -> None:
    while True:
        metrics.publish_load()
        await asyncio.sleep(_PUBLISH_SECONDS)


async def _maintain(store: Store) -> None:
    """Let the store do what is due, every few seconds."""
    while True:
        await asyncio.sleep(_MAINTENANCE_SECONDS)
        try:
            await anyio.to_thread.run_sync(store.maintain)
        except Exception:  # noqa: BLE001 - the next try may succeed
            _log.exception("the maintenance of the store failed")


def create_default_app() -> FastAPI:
    """Return the application configured by BONSAI_LORA_* variables, for `uvicorn --factory`."""
    return create_app(Settings())


def _include_routes(app: FastAPI) -> list[Route]:
    """Add all routes to `app`, and return them."""
    routes = [*(route for route in app.routes if isinstance(route, Route)), *ROUTES]
    app.router.routes.extend(ROUTER.routes)
    for route in routes:
        for method in route.methods or ():
            scope_of(method, route.path)  # raises KeyError for a forgotten one
    return routes


def choose_backend(settings: Settings) -> None:
    """Choose between kernels and NumPy for this process; log the reason if kernels cannot run."""
    reason = backend.choose(settings.kernels)
    if reason and settings.kernels == "auto":
        _log.warning("computing in NumPy, which is slower: %s", reason)
    backend.prepare()


def _make_context(settings: Settings, store: Store, shared: Path, metrics: Metrics) -> Context:
    limits = limits_of(settings)
    view = SetView(store, limits)
    bases = BaseFolder(Path(settings.bases) if settings.bases else None)
    regions = SharedRegions(shared / "regions" if settings.shared_memory else None)
    memory = Budget(settings.work_memory_bytes)
    places, threads = settings.max_concurrency, settings.threads
    has_spare_cores = min(threads, usable_cores()) > settings.workers
    long = Lane("long", places, threads)
    spill = Budget(settings.max_spill_bytes, "disk space", "max_spill_bytes", StoreFullError)
    job_lane = Lane("jobs", settings.max_jobs, threads, late_per_place=0)
    return Context(
        settings=settings,
        limits=limits,
        store=view,
        memory=memory,
        spill=spill,
        short=ShortLane(places, threads, has_spare_cores=has_spare_cores),
        long=long,
        opening=Lane("opening", places, _OPENING_THREADS) if settings.is_bucket else long,
        applier=Applier(limits, bases),
        regions=regions,
        counts=CountFile(shared),
        bases=bases,
        models=MergedModels(bases),
        checked_files=CheckedFiles(),
        executor=ThreadPoolExecutor(threads, "merge"),
        jobs=Jobs(store.jobs, job_lane, memory),
        gains=Gains(ExponentFolder(store.root / "exponents")),
        origins=Origins(read_sources(settings.sources), settings.stall_seconds, spill),
        metrics=metrics,
    )


def _collect(app: FastAPI, shared: Path) -> Iterable[Metric]:
    """Return the metrics of the whole service, as this process sees it."""
    context: Context = app.state.context
    return service_metrics(
        store_stats(SetView(app.state.store, context.limits)),
        _describe(app),
        budget_bytes=context.limits.memory_budget_bytes,
        restarts=read_restarts(shared),
    )


def _read_load(app: FastAPI) -> Load:
    """Return what this process has to do at the moment."""
    context: Context = app.state.context
    lanes = {context.short, context.long, context.opening, context.jobs.lane}
    budgets = {"memory": context.memory, "spill": context.spill}
    return {
        "requests_in_flight": {lane.name: lane.in_progress for lane in lanes},
        "queued_work": {lane.name: lane.waiting for lane in lanes},
        "reserved_bytes": {name: budget.reserved_bytes for name, budget in budgets.items()},
        "budget_bytes": {name: budget.total_bytes for name, budget in budgets.items()},
    }


def _describe(app: FastAPI) -> dict[str, str]:
    """Return the labels of `bonsai_lora_info`."""
    return {
        "version": app.version,
        "kernels": "off" if backend.running() is None else "on",
        "fast_lane": "off" if app.state.fast_lane is None else "on",
    }


def open_store(settings: Settings, shared: Path | None = None) -> Store:
    """Return the store that `settings` names; a temporary one is deleted with the object.

    Raises OSError, and ValueError for a bucket or cache that cannot be used.
    """
    if settings.is_bucket:
        from bonsai_lora.storage.bucket_store import open_bucket_store  # noqa: PLC0415 - optional

        return open_bucket_store(
            settings.store,
            Path(settings.cache),
            cache_bytes=settings.cache_bytes,
            stale_seconds=settings.stale_seconds,
            stale_if_error_seconds=settings.stale_if_error_seconds,
            shared=shared,
        )
    folder = settings.store_folder()
    store = SetStore(folder or _new_folder(), shared=shared)
    if folder is None:
        _remove_with(store, store.root)
    return store


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bonsai-lora-"))


def _remove_with(owner: object, folder: Path) -> None:
    """Delete `folder` when `owner` is garbage-collected."""
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)


def limits_of(settings: Settings) -> Limits:
    """Return the settings that are limits."""
    return Limits(**{name: getattr(settings, name) for name in Limits.__slots__})
