"""Parameters, memory, health and metrics."""

from bonsai_lora.client.answers import Estimate, Health, Readiness, SetStats, StoreStats
from bonsai_lora.client.call import Call, decode_text, path_of, query_of


def get_set_stats(
    name: str, *, base_param_count: int | None = None, version: int | None = None
) -> Call[SetStats]:
    """Return one set in numbers, with norm and effective rank of each delta.

    `efficiency_ratio` compares with the `base_param_count` parameters of a base model.
    """
    return Call(
        path=path_of("v1", "sets", name, "stats"),
        query=query_of(base_param_count=base_param_count, version=version),
    )


def get_stats() -> Call[StoreStats]:
    """Return all sets in numbers."""
    return Call(path="/v1/stats")


def estimate(d_in: int, d_out: int, rank: int, budget_bytes: int) -> Call[Estimate]:
    """Return how many adapters of this size fit into a budget."""
    return Call(
        path="/v1/estimate",
        query=query_of(d_in=d_in, d_out=d_out, rank=rank, budget_bytes=budget_bytes),
    )


def get_health() -> Call[Health]:
    """Return that the process is alive."""
    return Call(path="/healthz")


def get_readiness() -> Call[Readiness]:
    """Return how many sets are served, and which files were set aside."""
    return Call(path="/readyz")


def get_metrics() -> Call[str]:
    """Return the metrics in Prometheus's text format."""
    return Call(path="/metrics", decode=decode_text)
