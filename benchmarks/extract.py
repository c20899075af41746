"""Extracting a set from a merged 2 GB bfloat16 checkpoint, against reading both models.

With --layers N, of a checkpoint of Qwen3-8B's shapes with N layers (36: 16 GB; twice that on disk).
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import merged
from measure import report
from server import serving, worker_of

from bonsai_lora import Client

WORK_MEMORY = 2 << 30
PIECE = 1 << 24
COLUMNS = ("CPU s", "private MB", "rank", "relative error", "cosine to the merged set")


def read_all(*folders: Path) -> None:
    """Read every file, in pieces, through the page cache."""
    buffer = bytearray(PIECE)
    for folder in folders:
        for path in filter(Path.is_file, folder.iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sizes(layers: int | None) -> None:
    """Make `merged` write larger checkpoints."""
    if layers is not None:
        merged.HIDDEN, merged.INNER, merged.HEADS = 4096, 12288, 32
        merged.LAYERS, merged.VOCABULARY, merged.SHARDS = layers, 151_936, 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int)
    layers = parser.parse_known_args()[0].layers
    sizes(layers)
    wanted = [{"rank": merged.RANK}, {"energy": 0.9}]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        base, tuned = folder / "bases" / "base", folder / "bases" / "tuned"
        merged.write_base(base)
        merged.write_adapter(folder / "adapter")
        flags = (
            *("--store", str(folder / "store"), "--bases", str(folder / "bases")),
            *("--work-memory-bytes", str(WORK_MEMORY)),
        )
        with serving(*flags) as (url, process), Client(url) as client:
            client.upload_set("s", folder / "adapter")
            client.pull("base/s", tuned)
            os.sync()
        size = sum(path.stat().st_size for path in base.iterdir())
        rows: list[dict[str, object]] = []
        reading = min(merged.timed(lambda: read_all(base, tuned)) for _ in range(2))
        rows.append({"what": "reading both models", "s": reading, **dict.fromkeys(COLUMNS, "")})
        for options in wanted if layers is None else wanted[:1]:
            with serving(*flags) as (url, process), Client(url) as client:
                worker = worker_of(process)
                with merged.PrivateMemory(worker) as memory:
                    started, computed = time.perf_counter(), cpu_seconds(worker)
                    job = client.start_extract(f"s-{len(rows)}", "base", "tuned", **options)
                    made = client.wait_for(job)["report"]
                    seconds = time.perf_counter() - started
                    computed = cpu_seconds(worker) - computed
                same = client.compare(["s", f"s-{len(rows)}"])["cosine"][0][1]
            rows.append(
                {
                    "what": f"extract, {options}",
                    "s": seconds,
                    "CPU s": computed,
                    "private MB": memory.peak / 1e6,
                    "rank": made["rank"],
                    "relative error": made["relative_error"],
                    "cosine to the merged set": same,
                }
            )
    report(f"Two models of {size / 1e9:.2f} GB, bfloat16, in two threads", rows)


if __name__ == "__main__":
    main()
