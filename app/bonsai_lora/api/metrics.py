"""Prometheus metrics of one application."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from bonsai_lora.service.stats import StoreStats
from bonsai_lora.storage.protocol import StoreState

_LATENCY_SECONDS = (
    *(5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
_WORKER_FILE = re.compile(r"gauge_livesum_([0-9]+)\.db")


Load = Mapping[str, Mapping[str, float]]
"""What one process has to do at the moment: numbers by gauge, then by the gauge's label."""

_LOAD_GAUGES = (
    ("requests_in_flight", "Requests admitted and not yet answered.", "lane"),
    ("queued_work", "Work that is in a thread or waits for one.", "lane"),
    ("reserved_bytes", "Bytes reserved for requests in flight.", "resource"),
    ("budget_bytes", "Most bytes that can be reserved.", "resource"),
)
"""Name, description and label of the gauges of a `Load`."""


class Metrics:
    """Request counters, and gauges that are read on each scrape.

    With several workers, each writes its counters and its load to files that all of them sum up.
    """

    def __init__(
        self,
        collect_service: Callable[[], Iterable[Metric]],
        read_load: Callable[[], Load],
        read_store: Callable[[], StoreState] = StoreState,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._service_registry = CollectorRegistry()
        self._service_registry.register(_ServiceCollector(collect_service))
        self._service_registry.register(_WorkersCollector())
        counter = partial(_counter, registry)
        self._requests = counter("requests", "Requests answered.", "method", "route", "status")
        self._latency = Histogram(
            "bonsai_lora_request_seconds",
            "Time from the request head to the last byte of the response.",
            ["method", "route"],
            buckets=_LATENCY_SECONDS,
            registry=registry,
        )
        self._refusals = counter("refusals", "Requests refused, by the code of the error.", "code")
        self._read_store = read_store
        self._of_bucket = None if read_store().is_reachable is None else _BucketMetrics(registry)
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self.rows_applied = counter("rows_applied", "Vectors that adapters were applied to.")
        self.bytes_merged = counter("merged_bytes", "Bytes of merged weights produced.")
        self._read_load = read_load
        self._load = {one[0]: _load_gauge(registry, *one) for one in _LOAD_GAUGES}
        self.keys_file_errors = counter(
            "keys_file_errors", "Times that the keys file was changed to one that cannot be used."
        )

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request and its latency."""
        key = (method, route, status)
        known = self._children.get(key)
        if known is None:
            known = self._children[key] = (
                self._requests.labels(method, route, str(status)),
                self._latency.labels(method, route),
            )
        known[0].inc()
        known[1].observe(seconds)

    def count_refusal(self, code: str) -> None:
        """Count a refusal; `code` is that of an error class."""
        self._refusals.labels(code).inc()

    def publish_load(self) -> None:
        """Update this process's gauges and the store's counters, which other workers read."""
        if self._of_bucket is not None:
            self._of_bucket.publish(self._read_store())
        for name, numbers in self._read_load().items():
            for label, number in numbers.items():
                self._load[name].labels(label).set(number)

    def render(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        self.publish_load()
        own = (
            _text_of_all_workers()
            if "PROMETHEUS_MULTIPROC_DIR" in os.environ
            else generate_latest(self._registry)
        )
        return own + generate_latest(self._service_registry)


def inherit_counters(folder: Path, died: int) -> None:
    """Let this process, which has no metrics yet, go on with the counters of a process that died.

    Otherwise there would be more files with each death, all of which are read by each scrape.
    """
    for path in folder.glob(f"*_{died}.db"):
        if not path.name.startswith("gauge"):
            path.rename(path.with_name(path.name.replace(f"_{died}.", f"_{os.getpid()}.")))


def _text_of_all_workers() -> bytes:
    """Return the sums of what all workers have written."""
    for worker in _workers():
        if not _is_running(worker):
            mark_process_dead(worker)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    while True:
        try:
            return generate_latest(registry)
        except FileNotFoundError:  # a process has just inherited it
            continue


def _counter(registry: CollectorRegistry, name: str, description: str, *labels: str) -> Counter:
    return Counter(f"bonsai_lora_{name}", description, labels, registry=registry)


def _load_gauge(registry: CollectorRegistry, name: str, description: str, label: str) -> Gauge:
    return Gauge(
        f"bonsai_lora_{name}",
        description,
        [label],
        registry=registry,
        multiprocess_mode="livesum",
    )


class _BucketMetrics:
    """What this process did with the bucket that is its store, and with the copies of its sets."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(_counter, registry)
        self._requests = counter("store_requests", "Requests to the bucket.", "kind")
        self._looks = counter("store_looks", "Comparisons with the bucket.", "result")
        self._others = {
            "hits": counter("cache_hits", "Sets that were served without asking the bucket."),
            "fetches": counter("cache_misses", "Sets that were fetched."),
            "fetched_bytes": counter("store_fetched_bytes", "Bytes of sets that were fetched."),
            "fetch_seconds": counter("store_fetch_seconds", "Time that fetching sets took."),
            "evictions": counter("cache_evictions", "Copies that were removed to make room."),
            "looks_stale": counter("stale_served", "Sets served late as the bucket is away."),
        }
        self._published: dict[str, float] = {}
        self._bytes, self._last_ok = (
            Gauge(f"bonsai_lora_{name}", text, registry=registry, multiprocess_mode="livemax")
            for name, text in (
                ("cache_bytes", "Size of the copies of sets."),
                ("store_last_ok_timestamp_seconds", "Unix time of the bucket's last answer."),
            )
        )

    def publish(self, state: StoreState) -> None:
        """Add what has happened since the last time."""
        self._bytes.set(state.cache_bytes)
        self._last_ok.set(state.last_ok)
        for key, total in list(state.counts.items()):
            new = total - self._published.get(key, 0)
            self._published[key] = total
            counter = self._others.get(key)
            if counter is None:
                kind, _, label = key.partition("_")
                counter = (self._requests if kind == "requests" else self._looks).labels(label)
            counter.inc(new)


def _workers() -> list[int]:
    """Return the process ids of the workers that have published their load."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return [os.getpid()]
    found = (_WORKER_FILE.fullmatch(path.name) for path in Path(folder).iterdir())
    return sorted(int(match[1]) for match in found if match)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class _ServiceCollector(Collector):
    collect_service: Callable[[], Iterable[Metric]]

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return self.collect_service()


class _WorkersCollector(Collector):
    """Prometheus's standard figures of a process (CPU, memory, descriptors), for each worker."""

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for worker in _workers():
            for one in ProcessCollector(pid=partial(int, worker), registry=None).collect():
                family = found.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    family.add_sample(sample.name, {"pid": str(worker)}, sample.value)
        return found.values()


def service_metrics(
    stats: StoreStats, about: Mapping[str, str], *, budget_bytes: int, restarts: int
) -> Iterable[Metric]:
    """Yield what the store holds and what this service is."""
    info = GaugeMetricFamily(
        "bonsai_lora_info",
        "Version and configuration of this service; always 1.",
        labels=list(about),
    )
    info.add_metric(list(about.values()), 1)
    yield info
    yield CounterMetricFamily(
        "bonsai_lora_worker_restarts", "Workers replaced after they died.", restarts
    )
    for name, description, value in (
        ("sets", "Sets in the store.", stats.sums.sets),
        ("bad_files", "Files in the store that could not be read.", stats.bad_file_count),
        (
            "newer_files",
            "Files in the store that a newer release wrote; they are kept but not served.",
            stats.sums.newer,
        ),
        ("adapters", "Adapters in all sets.", stats.sums.adapters),
        ("sets_bytes", "Size of all sets as float32.", stats.sums.held_bytes),
        ("sets_budget_bytes", "What all sets may take as float32.", budget_bytes),
        (
            "resident_bytes",
            "Bytes of this process's open sets that are resident in memory.",
            stats.resident_bytes,
        ),
    ):
        yield GaugeMetricFamily(f"bonsai_lora_{name}", description, value)
