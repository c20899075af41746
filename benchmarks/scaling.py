"""What work costs as it grows: rows, rank, modules, sets, workers, size of the checkpoint.

One measured line each, and the straight line that theory expects; plots go to docs/plots.
"""

import argparse
import tempfile
import time
from pathlib import Path

from load import run_load
from measure import in_turns, report
from merged import write_adapter, write_base
import merged
from server import serving
from throughput import BINARY, WIDTH, native_json, ours, vectors

import httpx
import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.formats import safetensors
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore

PLOTS = Path(__file__).parent.parent / "docs" / "plots"
Points = list[tuple[float, float]]


def adapter(rank: int) -> LoraAdapter:
    rng = np.random.default_rng(rank)
    config = LoraConfig(rank=rank, alpha=2.0 * rank)
    a_matrix = rng.standard_normal((rank, WIDTH)).astype(np.float32)
    b_matrix = rng.standard_normal((WIDTH, rank)).astype(np.float32)
    return LoraAdapter(config, a_matrix, b_matrix, config.scaling)


def by_rows() -> Points:
    one = adapter(16)
    return [(rows, apply_ms(one, vectors(rows))) for rows in (1, 4, 16, 64, 256, 1024, 4096)]


def by_rank() -> Points:
    return [(rank, apply_ms(adapter(rank), vectors(64))) for rank in (1, 4, 16, 64, 256)]


def apply_ms(one: LoraAdapter, x: np.ndarray) -> float:
    return 1e3 * in_turns({"": lambda: one.apply(x)}, seconds=0.5)[""]


def by_modules() -> Points:
    """One request for so many modules of a Qwen3-8B set, one row each."""
    x = vectors(1)
    found = []
    with (
        tempfile.TemporaryDirectory() as store,
        serving("--store", store) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        create = {"name": "s", "model": "qwen3-8b", "config": {"rank": 8}}
        client.post("/v1/sets", json=create).raise_for_status()
        infos = client.get("/v1/sets/s/adapters").json()["adapters"]
        fitting = [one["name"] for one in infos if one["d_in"] == WIDTH]
        for count in (1, 2, 6, 18, 54, 216):
            query = "&".join(f"module={name}" for name in fitting[:count])
            body = safetensors.encode({"inputs": x})
            headers = {"Content-Type": BINARY}

            def ask(query=query, body=body, headers=headers) -> None:
                answer = client.post(f"/v1/sets/s/apply?{query}", content=body, headers=headers)
                answer.raise_for_status()

            found.append((count, 1e3 * in_turns({"": ask}, seconds=1.0)[""]))
    return found


def by_sets() -> Points:
    """One row through sets taken in turn, out of so many; milliseconds a request."""
    found = []
    body = safetensors.encode({"inputs": np.ones((1, 64), np.float32)})
    headers = {"Content-Type": BINARY}
    with tempfile.TemporaryDirectory() as folder:
        store = SetStore(Path(folder))
        made = BonsaiLoraSet.new(LoraConfig(rank=8), "base", "s00000").add_adapters({"m": (64, 64)})
        with store.lock("s00000"):
            store.write(
                NextVersion(
                    lora_set=made, origin="initialized", now="2026-01-01T00:00:00Z", previous=None
                )
            )
        source = Path(folder) / "sets" / "s00000.safetensors"
        raw = source.read_bytes()
        for number in range(1, 10_000):
            name = f"s{number:05}"
            source.with_name(f"{name}.safetensors").write_bytes(
                raw.replace(b"s00000", name.encode())
            )
        with (
            serving("--store", folder) as (url, _),
            httpx.Client(base_url=url, timeout=60) as client,
        ):
            for count in (1, 10, 100, 1000, 10_000):
                order = np.random.default_rng(count).integers(0, count, 1000)
                times = []
                for number in order:
                    path = f"/v1/sets/s{number:05}/adapters/m/apply"
                    started = time.perf_counter()
                    client.post(path, content=body, headers=headers).raise_for_status()
                    times.append(time.perf_counter() - started)
                found.append((count, 1e3 * float(np.median(times))))
    return found


def by_workers() -> Points:
    """Requests per second of 32 rows as JSON, which take the server long and the client little."""
    found = []
    request = native_json(vectors(32), 16)
    for workers in (1, 2):
        with ours("--workers", str(workers), cores={0, 1}) as at:
            found.append((workers, run_load(at, request, 3.0, connections=8)["rps"]))
    return found


def by_checkpoint() -> Points:
    """Seconds for all merged files of a checkpoint of so many megabytes."""
    found = []
    for layers in (2, 6, 18):
        merged.LAYERS = layers
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_base(folder / "bases" / "base")
            write_adapter(folder / "adapter")
            flags = ("--store", str(folder / "store"), "--bases", str(folder / "bases"))
            with serving(*flags) as (url, _), httpx.Client(base_url=url, timeout=300) as client:
                files = {
                    name: (folder / "adapter" / f"{name}.{ending}").read_bytes()
                    for name, ending in (
                        ("adapter_config", "json"),
                        ("adapter_model", "safetensors"),
                    )
                }
                client.put("/v1/sets/s", files=files).raise_for_status()
                listed = client.get("/v1/bases/base/merged/s").json()["files"]
                size = sum(one["size_bytes"] for one in listed)
                times = []
                for _ in range(2):
                    started = time.perf_counter()
                    for one in listed:
                        path = f"/v1/bases/base/merged/s/{one['name']}"
                        with client.stream("GET", path) as answer:
                            for _ in answer.iter_raw(1 << 20):
                                pass
                    times.append(time.perf_counter() - started)
                found.append((size / 1e6, min(times)))
    return found


QUESTIONS = {
    "rows": (by_rows, "rows", "ms for one apply, 4096→4096, rank 16", "line"),
    "rank": (by_rank, "rank", "ms for one apply of 64 rows, 4096→4096", "line"),
    "modules": (by_modules, "modules in one request", "ms over loopback, one row, rank 8", "line"),
    "sets": (by_sets, "sets in the store", "ms over loopback, one row of 64", "flat"),
    "workers": (by_workers, "workers on two cores", "requests/s of 32 rows as JSON", "line"),
    "checkpoint": (
        by_checkpoint,
        "MB of merged checkpoint",
        "s for all files over loopback",
        "line",
    ),
}


def plot(name: str, points: Points) -> None:
    """Draw one plot, where matplotlib is installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = name  # the same picture gives the same file
    import matplotlib.pyplot as plt

    _, x_label, y_label, theory = QUESTIONS[name]
    xs, ys = np.array(points).T
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.plot(xs, ys, "o-", color="#1f6f4a", label="measured")
    if theory == "flat":
        axes.plot(xs, np.full(len(xs), np.median(ys)), ":", color="#888888", label="constant")
        axes.set_xscale("log")
    else:
        fit = np.polyfit(xs, ys, 1, w=1 / ys)
        axes.plot(xs, np.polyval(fit, xs), ":", color="#888888", label="straight line")
        if xs.max() / xs.min() > 50:
            axes.set_xscale("log")
            axes.set_yscale("log")
    axes.set_ylim(bottom=None if axes.get_yscale() == "log" else 0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=QUESTIONS)
    only = parser.parse_known_args()[0].only
    rows = []
    for name, (measure, x_label, y_label, _) in QUESTIONS.items():
        if only not in (None, name):
            continue
        points = measure()
        plot(name, points)
        for x, y in points:
            rows.append({"question": name, "x": f"{x:g}", "y": y, "what": f"{x_label}; {y_label}"})
    report("Cost against work", rows)


if __name__ == "__main__":
    main()
