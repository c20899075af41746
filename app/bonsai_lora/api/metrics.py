"""Prometheus metrics of one application."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from bonsai_lora.service.stats import StoreStats

_LATENCY_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """Request counters, and gauges of the store that are read on each scrape."""

    def __init__(
        self, store_stats: Callable[[], StoreStats], describe: Callable[[], dict[str, str]]
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._store_registry = CollectorRegistry()
        for registry in (self._registry, self._store_registry):
            registry.register(_StoreCollector(store_stats, describe))
        self._requests = Counter(
            "bonsai_lora_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._latency = Histogram(
            "bonsai_lora_request_seconds",
            "Time from the request head to the last byte of the response.",
            ["method", "route"],
            buckets=_LATENCY_SECONDS,
            registry=self._registry,
        )
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self.rows_applied = Counter(
            "bonsai_lora_rows_applied",
            "Vectors that adapters were applied to.",
            registry=self._registry,
        )
        self.bytes_merged = Counter(
            "bonsai_lora_merged_bytes",
            "Bytes of merged weights produced.",
            registry=self._registry,
        )

        self.keys_file_errors = Counter(
            "bonsai_lora_keys_file_errors",
            "Times that the keys file was changed to one that cannot be used.",
            registry=self._registry,
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

    def render(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry) + generate_latest(self._store_registry)


@dataclass(frozen=True, eq=False)
class _StoreCollector(Collector):
    store_stats: Callable[[], StoreStats]
    info: Callable[[], dict[str, str]]

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        about = self.info()
        info = GaugeMetricFamily(
            "bonsai_lora_info",
            "Version and configuration of this service; always 1.",
            labels=list(about),
        )
        info.add_metric(list(about.values()), 1)
        yield info
        stats = self.store_stats()
        yield GaugeMetricFamily("bonsai_lora_sets", "Sets in the store.", stats.set_count)
        yield GaugeMetricFamily(
            "bonsai_lora_newer_files",
            "Files in the store that a newer release wrote; they are kept but not served.",
            stats.newer_file_count,
        )
        yield GaugeMetricFamily(
            "bonsai_lora_adapters", "Adapters in all sets.", stats.adapter_count
        )
        yield GaugeMetricFamily(
            "bonsai_lora_sets_bytes", "Size of all sets as float32.", stats.total_memory_bytes
        )
        yield GaugeMetricFamily(
            "bonsai_lora_resident_bytes",
            "Bytes of this process's open sets that are resident in memory.",
            stats.resident_bytes,
        )
