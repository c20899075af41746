"""The store: uploads against cp plus fsync, 100 to 100,000 sets, look-ups, restarts.

With `--only-sizes` only the costs by number of sets; with `--hundred-thousand` also at that number,
which writes 100,000 files (400 MB) and takes minutes. With `--bucket` only those costs over a bucket
of SeaweedFS, which the environment of `make test-cluster` has:

    .venv-cluster/bin/python benchmarks/store.py --bucket
"""

import argparse
import contextlib
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
from store_sizes import ASKED, asked_rows, make_small_sets, wait_until_ready

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
            shutil.rmtree(root / "index-1")
            rows.append(start_row(root, count))
            url, _ = stack.enter_context(serving("--store", str(root)))
            wait_until_ready(url)
            services[count] = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        return rows + asked_rows(services, ASKED)


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
    parser.add_argument("--bucket", action="store_true")
    chosen, _ = parser.parse_known_args()
    large = [10_000, *([100_000] if chosen.hundred_thousand else [])]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        if chosen.bucket:
            from store_bucket import bucket_rows

            report("The store in a bucket", bucket_rows(folder, [10, *large]))
            return
        rows = size_rows(folder, [100, *large])
        if not chosen.only_sizes:
            rows += upload_rows(folder) + many_rows(folder)
            rows += [workers_row(folder, workers) for workers in (1, 4)]
    report("The store", rows)


if __name__ == "__main__":
    sys.exit(main())
