"""The store: uploads against cp plus fsync, 100 to 100,000 sets, look-ups, restarts.

With `--only-sizes` only the costs by number of sets; with `--hundred-thousand` also at that number,
which writes 100,000 files (400 MB) and takes minutes.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import in_turns, report
from server import serving

import httpx
import ml_dtypes
import numpy as np

from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.shapes import MODELS
from bonsai_lora.formats import safetensors
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore

ROUNDS = 5


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """Write a Qwen3-8B rank-16 adapter in bfloat16 (87 MB) as peft would."""
    shapes = MODELS["qwen3-8b"].modules()
    rng = np.random.default_rng(1)
    tensors = {}
    for module, (d_in, d_out) in shapes.items():
        for half, shape in (("A", (16, d_in)), ("B", (d_out, 16))):
            values = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors.encode(tensors))
    return folder / "adapter_config.json", folder / "adapter_model.safetensors"


def copy_and_sync(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def upload_rows(folder: Path) -> list[dict[str, object]]:
    config, model = adapter_files(folder)
    with serving("--store", str(folder / "store")) as (url, _):
        # curl, because a Python client would take longer to send than the service to receive.
        command = [
            "curl",
            "-sf",
            "-o",
            "/dev/null",
            "-X",
            "PUT",
            f"{url}/v1/sets/big",
            "-H",
            "Expect:",
        ]
        command += ["-F", f"adapter_config=@{config}", "-F", f"adapter_model=@{model}"]

        def upload() -> None:
            subprocess.run(command, check=True)

        seconds = in_turns(
            {"upload": upload, "cp": lambda: copy_and_sync(model, folder / "copy")}, seconds=15
        )
    return [
        {"what": "upload of a Qwen3-8B rank-16 adapter, bfloat16, by curl until it is acknowledged",
         "figure": f"{seconds['upload'] * 1e3:.0f} ms for {model.stat().st_size / 1e6:.0f} MB"},
        {"what": "the same file by cp and fsync, in turns", "figure": f"{seconds['cp'] * 1e3:.0f} ms"},
        {"what": "ratio", "figure": f"{seconds['upload'] / seconds['cp']:.2f}"},
    ]  # fmt: skip


def many_rows(folder: Path) -> list[dict[str, object]]:
    store = SetStore(folder / "many")
    one = store_one(store, "set-00000")
    source = folder / "many" / "sets" / "set-00000.safetensors"
    rows = [{"what": "look-up of an open set, 1 set in the store", "figure": lookup(store)}]
    raw = source.read_bytes()
    for index in range(1, 10_000):
        name = f"set-{index:05}"
        (source.parent / f"{name}.safetensors").write_bytes(
            raw.replace(one.record.name.encode(), name.encode())
        )
    rows.append(
        {"what": "look-up of an open set, 10,000 sets", "figure": lookup(SetStore(folder / "many"))}
    )
    started = time.perf_counter()
    SetStore(folder / "many")
    rows.append(
        {
            "what": "opening the store of 10,000 sets",
            "figure": f"{(time.perf_counter() - started) * 1e3:.1f} ms",
        }
    )
    started = time.perf_counter()
    with serving("--store", str(folder / "many")) as (url, _):
        answer = httpx.post(
            f"{url}/v1/sets/set-05000/adapters/up_proj/apply", json={"inputs": [0.5] * 64}
        )
        answer.raise_for_status()
        rows.append({"what": "from starting the command over 10,000 sets to the first apply answered",
                     "figure": f"{(time.perf_counter() - started) * 1e3:.0f} ms"})  # fmt: skip
    return rows


def size_rows(folder: Path, counts: list[int]) -> list[dict[str, object]]:
    """Costs by number of sets: one service for each number, asked in turns."""
    rows = []
    with contextlib.ExitStack() as stack:
        services = {}
        for count in counts:
            root = folder / f"sized-{count}"
            make_small_sets(root, count)
            rows.append(start_row(root, count))
            url, _ = stack.enter_context(serving("--store", str(root)))
            wait_until_ready(url)
            services[count] = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        for what, ask in ASKED.items():
            rivals = {str(count): ask(client, count) for count, client in services.items()}
            seconds = in_turns(rivals, seconds=4)
            figures = " / ".join(f"{seconds[str(count)] * 1e3:.2f}" for count in counts)
            sizes = " / ".join(f"{count:,}" for count in counts)
            rows.append({"what": f"{what}, {sizes} sets", "figure": f"{figures} ms"})
    return rows


def start_row(root: Path, count: int) -> dict[str, object]:
    """How long a start takes until the service is ready."""

    def start(*flags: str) -> str:
        started = time.perf_counter()
        with serving("--store", str(root), *flags) as (url, _):
            wait_until_ready(url)
            return f"{time.perf_counter() - started:.2f} s"

    first, again = start(), start()
    (root / "sets" / "by-others").touch()
    changed = start()
    (root / "sets" / "by-others").unlink()
    shutil.rmtree(root / "index-1")
    return {
        "what": f"{count:,} sets: start until ready, without an index / with one / with one after "
        "others changed the folder / without one, four workers",
        "figure": f"{first} / {again} / {changed} / {start('--workers', '4')}",
    }


def make_small_sets(root: Path, count: int) -> None:
    """Write `count` sets of one tiny module, as copies of a set that the store wrote."""
    store, name = SetStore(root), "set-000000"
    made = BonsaiLoraSet.new(LoraConfig(rank=1), "base", name).add_adapters({"m": (4, 4)})
    with store.lock(name):
        store.write(
            NextVersion(
                lora_set=made, origin="initialized", now="2026-01-01T00:00:00Z", previous=None
            )
        )
    raw = (root / "sets" / f"{name}.safetensors").read_bytes()
    for index in range(1, count):
        other = f"set-{index:06}"
        path = root / "sets" / f"{other}.safetensors"
        path.write_bytes(raw.replace(name.encode(), other.encode()))
    shutil.rmtree(root / "index-1")


def wait_until_ready(url: str) -> None:
    while True:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/readyz", timeout=300).raise_for_status()
            return
        time.sleep(0.01)


def getting(path: str):
    """Return what makes a call that gets a path, with the name of a set in the middle."""

    def make(client: httpx.Client, count: int):
        url = path.format(middle=f"set-{count // 2:06}")
        return lambda: client.get(url).raise_for_status()

    return make


def creating(client: httpx.Client, _count: int):
    numbers = itertools.count()
    body = {"mlp": {"hidden_size": 4, "intermediate_size": 4}, "config": {"rank": 1}}
    return lambda: client.post(
        "/v1/sets", json={"name": f"new-{next(numbers)}", **body}
    ).raise_for_status()


def deleting(client: httpx.Client, _count: int):
    numbers = itertools.count()
    return lambda: client.delete(f"/v1/sets/new-{next(numbers)}")


ASKED = {
    "creating a set": creating,
    "deleting a set": deleting,
    "GET /v1/sets/{set}": getting("/v1/sets/{middle}"),
    "GET /v1/sets, a page of 100": getting("/v1/sets?cursor={middle}"),
    "the same for one base": getting("/v1/sets?cursor={middle}&base_model_name=base"),
    "the same for a prefix": getting("/v1/sets?prefix=set-0000"),
    "GET /readyz": getting("/readyz"),
    "GET /metrics": getting("/metrics"),
    "GET /v1/stats": getting("/v1/stats"),
}


def store_one(store: SetStore, name: str):
    made = BonsaiLoraSet.new(LoraConfig(rank=8), "base", name).add_mlp_adapters(64, 128)
    with store.lock(name):
        return store.write(
            NextVersion(
                lora_set=made, origin="initialized", now="2026-01-01T00:00:00Z", previous=None
            )
        )


def lookup(store: SetStore) -> str:
    store.read("set-00000")

    def thousand() -> None:
        for _ in range(1000):
            store.read("set-00000")

    return f"{in_turns({'read': thousand}, seconds=1)['read'] * 1e3:.2f} µs"


def workers_row(folder: Path, workers: int) -> dict[str, object]:
    """Private memory of all processes after every worker has applied every set."""
    store = SetStore(folder / "large")
    if not store.list_names():
        for index in range(20):
            name = f"set-{index:02}"
            made = BonsaiLoraSet.new(LoraConfig(rank=256), "b", name).add_adapters(
                {"m": (4096, 12288)}
            )
            with store.lock(name):
                store.write(
                    NextVersion(
                        lora_set=made,
                        origin="initialized",
                        now="2026-01-01T00:00:00Z",
                        previous=None,
                    )
                )
    with serving("--store", str(folder / "large"), "--workers", str(workers)) as (url, process):
        for _ in range(10 * workers):
            with httpx.Client(timeout=60) as client:
                for index in range(20):
                    path = f"{url}/v1/sets/set-{index:02}/adapters/m/apply"
                    client.post(path, json={"inputs": [0.5] * 4096}).raise_for_status()
        return {
            "what": f"private memory of {workers} worker(s) over 20 sets of 17 MB, all applied",
            "figure": f"{private_bytes(process.pid) / 1e6:.0f} MB",
        }


def private_bytes(pid: int) -> int:
    """Private memory of a process and its children, without clean pages of mapped files.

    Those count as private where one process maps a file and as shared where several do.
    """
    children = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    )
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty"):
            total += int(line.split()[1]) * 1024
    return total + sum(private_bytes(int(child)) for child in children.stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only-sizes", action="store_true")
    parser.add_argument("--hundred-thousand", action="store_true")
    chosen, _ = parser.parse_known_args()
    counts = [100, 10_000, *([100_000] if chosen.hundred_thousand else [])]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        rows = size_rows(folder, counts)
        if not chosen.only_sizes:
            rows += upload_rows(folder) + many_rows(folder)
            rows += [workers_row(folder, workers) for workers in (1, 4)]
    report("The store", rows)


if __name__ == "__main__":
    sys.exit(main())
