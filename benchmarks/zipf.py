"""What a bucket is asked under load: cache hits, fetches and pointer checks, by simulation.

Requests name sets by Zipf's law. Each replica keeps the sets that it used last, as many as its disk
holds, and compares a set with the bucket when its last comparison is older than `--stale-seconds`
(while it serves). `by name` sends each set to one replica, `at random` each request to any. Some
replicas are simulated, and stand for all of them. docs/scale.md uses the figures:

    python benchmarks/zipf.py
"""

import argparse
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """A service: sets of one size, replicas, and what is asked of them all."""

    sets: int
    set_bytes: float
    replicas: int
    cache_bytes: float
    requests_per_second: float
    exponent: float
    stale_seconds: float

    @property
    def cached_sets(self) -> int:
        """Sets that one replica's disk holds."""
        return int(self.cache_bytes / self.set_bytes)

    def popularity(self) -> np.ndarray:
        """Return the share of requests that name each set, the most popular one first."""
        weights = np.arange(1, self.sets + 1, dtype=np.float64) ** -self.exponent
        return weights / weights.sum()


@dataclass(frozen=True)
class Figures:
    """What one replica did per second, once its cache was warm."""

    requests: float
    fetches: float
    checks: float


def simulate(requests: np.ndarray, times: np.ndarray, plan: Plan) -> Figures:
    """Run requests (indices of sets) at `times` (s) through a replica; count the second half."""
    checked: OrderedDict[int, float] = OrderedDict()
    begin = times[len(times) // 2]
    fetches = checks = 0
    for name, time in zip(requests.tolist(), times.tolist(), strict=True):
        last = checked.pop(name, None)
        counts = time >= begin
        if last is None:
            fetches += counts
            last = time
            if len(checked) >= plan.cached_sets:
                checked.popitem(last=False)
        elif time - last > plan.stale_seconds:
            checks += counts
            last = time
        checked[name] = last
    seconds = times[-1] - begin
    return Figures(np.count_nonzero(times >= begin) / seconds, fetches / seconds, checks / seconds)


def of_one_replica(plan: Plan, share: np.ndarray, count: int, rng: np.random.Generator) -> Figures:
    """Simulate `count` requests to a replica that is sent `share` of the requests for each set."""
    rates = plan.requests_per_second * share
    total = rates.sum()
    names = rng.choice(len(share), size=count, p=rates / total)
    times = np.cumsum(rng.exponential(1 / total, size=count))
    return simulate(names, times, plan)


def mean_of(figures: list[Figures]) -> Figures:
    """Return the mean of what some replicas did."""
    return Figures(
        *(
            float(np.mean([getattr(one, name) for one in figures]))
            for name in ("requests", "fetches", "checks")
        )
    )


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--sets", type=int, default=1_000_000)
    options.add_argument("--set-mb", type=float, default=20)
    options.add_argument("--replicas", type=int, default=1000)
    options.add_argument("--cache-gb", type=float, nargs="+", default=[10, 50])
    options.add_argument("--rps", type=float, default=100_000, help="of all replicas together")
    options.add_argument("--exponents", type=float, nargs="+", default=[0.8, 1.0, 1.2])
    options.add_argument("--stale-seconds", type=float, default=5)
    options.add_argument("--simulated", type=int, default=8, help="replicas of each way")
    options.add_argument("--count", type=int, default=200_000, help="requests to each replica")
    given = options.parse_args()
    print(
        f"{given.sets:,} sets of {given.set_mb:g} MB, {given.replicas:,} replicas, "
        f"{given.rps:,.0f} requests/s, compared every {given.stale_seconds:g} s\n"
        f"{'Zipf':>5} {'cache':>6} {'balancing':>10} {'hits':>8} {'fetches/s':>10} "
        f"{'GB/s':>7} {'checks/s':>9} {'busiest set':>12}"
    )
    for exponent in given.exponents:
        for gigabytes in given.cache_gb:
            plan = Plan(
                given.sets,
                1e6 * given.set_mb,
                given.replicas,
                1e9 * gigabytes,
                given.rps,
                exponent,
                given.stale_seconds,
            )
            report(plan, given.simulated, given.count)


def report(plan: Plan, simulated: int, count: int) -> None:
    """Print a line for each way of balancing, with sums over all replicas."""
    rng = np.random.default_rng(1)
    popularity = plan.popularity()
    home = rng.integers(plan.replicas, size=plan.sets)
    chosen = rng.choice(plan.replicas, size=min(simulated, plan.replicas), replace=False)
    ways = {
        "by name": [np.where(home == one, popularity, 0.0) for one in chosen],
        "at random": [popularity / plan.replicas] * min(2, simulated),
    }
    for way, shares in ways.items():
        mean = mean_of([of_one_replica(plan, share, count, rng) for share in shares])
        # A sample of replicas may hold more or less than its part of the load.
        scale = plan.requests_per_second / mean.requests
        fetches, checks = mean.fetches * scale, mean.checks * scale
        print(
            f"{plan.exponent:5.1f} {plan.cache_bytes / 1e9:4.0f} GB {way:>10} "
            f"{1 - fetches / plan.requests_per_second:8.2%} {fetches:10,.0f} "
            f"{fetches * plan.set_bytes / 1e9:7,.1f} {checks:9,.0f} {popularity[0]:12.2%}"
        )


if __name__ == "__main__":
    main()
