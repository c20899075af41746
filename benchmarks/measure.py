"""What the benchmarks share: timing in turns, and a table at the end."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# One BLAS thread, unless asked otherwise; before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("BENCH_THREADS", "1"))


def in_turns(rivals: dict[str, Callable[[], object]], *, seconds: float = 2.0) -> dict[str, float]:
    """Return the median seconds of each rival; they take turns for `seconds` in all."""
    for run in rivals.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, run in rivals.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(one) for name, one in times.items()}


def report(title: str, rows: list[dict[str, object]]) -> None:
    """Print `rows` as a Markdown table; write them to the file that --json names."""
    columns = list(rows[0])
    print(f"\n### {title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print(
            "| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |", flush=True
        )
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    target = parser.parse_known_args()[0].json
    if target is not None:
        about = {"title": title, "machine": platform.processor() or platform.machine()}
        target.write_text(json.dumps({**about, "cores": os.cpu_count(), "rows": rows}, indent=1))


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
