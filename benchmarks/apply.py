"""Apply in process, against the float32 peak of one core and PEFT's LoRA branch on torch CPU."""

import argparse
import contextlib
import json
import os
import subprocess
import sys

from measure import in_turns, report

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.crew import set_threads
from bonsai_lora.core.config import LoraConfig

SHAPES = [(4096, 4096, 8), (4096, 12288, 16), (12288, 4096, 64), (4096, 1024, 16)]
ROWS = [1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256]


def peak_gflops() -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1024, 1024)).astype(np.float32) for _ in range(2))
    out = np.empty_like(a)
    return 2 * 1024**3 / in_turns({"matmul": lambda: np.matmul(a, b, out=out)})["matmul"] / 1e9


def torch_branch(a_matrix, b_matrix, scaling):
    """PEFT's branch, `lora_B(lora_A(dropout(x))) * scaling`, without the base layer beside it."""
    import torch

    torch.set_num_threads(int(os.environ["OPENBLAS_NUM_THREADS"]))
    down = torch.nn.Linear(a_matrix.shape[1], a_matrix.shape[0], bias=False)
    up = torch.nn.Linear(b_matrix.shape[1], b_matrix.shape[0], bias=False)
    down.weight.data = torch.from_numpy(a_matrix.copy())
    up.weight.data = torch.from_numpy(b_matrix.copy())

    def run(x):
        with torch.no_grad():
            return up(down(x)) * scaling

    return run, torch.from_numpy


def measured(rivals: list[str]) -> dict[str, dict[str, float]]:
    """Return the median seconds of each rival for each shape and number of rows."""
    set_threads(int(os.environ["OPENBLAS_NUM_THREADS"]))
    rng = np.random.default_rng(1)
    found: dict[str, dict[str, float]] = {}
    for d_in, d_out, rank in SHAPES:
        config = LoraConfig(rank=rank, alpha=2.0 * rank)
        a_matrix = rng.standard_normal((rank, d_in)).astype(np.float32)
        b_matrix = rng.standard_normal((d_out, rank)).astype(np.float32)
        adapter = LoraAdapter(config, a_matrix, b_matrix, config.scaling)
        for count in ROWS:
            x = rng.standard_normal((count, d_in)).astype(np.float32)
            runs = {}
            if "ours" in rivals:
                runs["ours"] = lambda adapter=adapter, x=x: adapter.apply(x)
            if "torch" in rivals:
                with contextlib.suppress(ImportError):
                    branch, tensor = torch_branch(a_matrix, b_matrix, config.scaling)
                    theirs = tensor(x)
                    runs["torch"] = lambda branch=branch, theirs=theirs: branch(theirs)
            if runs:
                found[f"{d_in}→{d_out} r{rank} {count}"] = in_turns(runs, seconds=0.2 * len(runs))
    return found


def in_processes_of_their_own() -> dict[str, dict[str, float]]:
    """Measure each rival alone: the threads of two libraries wait for work on the same cores."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(2):
        for rival in ("ours", "torch"):
            command = [sys.executable, __file__, "--rival", rival]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            for key, seconds in json.loads(done.stdout).items():
                best = found.setdefault(key, {})
                best |= {name: min(one, best.get(name, one)) for name, one in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rival")
    rival = parser.parse_known_args()[0].rival
    if rival is not None:
        print(json.dumps(measured([rival])))
        return
    threads = os.environ["OPENBLAS_NUM_THREADS"]
    peak = peak_gflops()
    found = measured(["ours", "torch"]) if threads == "1" else in_processes_of_their_own()
    rows = []
    for d_in, d_out, rank in SHAPES:
        for count in ROWS:
            seconds = found[f"{d_in}→{d_out} r{rank} {count}"]
            operations = 2 * count * rank * (d_in + d_out)
            rows.append(
                {
                    "shape": f"{d_in}→{d_out} r{rank}",
                    "rows": count,
                    "µs": seconds["ours"] * 1e6,
                    "of peak": operations / seconds["ours"] / 1e9 / peak,
                    "PEFT branch µs": seconds["torch"] * 1e6 if "torch" in seconds else "",
                    "PEFT / ours": seconds["torch"] / seconds["ours"] if "torch" in seconds else "",
                }
            )
    report(f"Apply, threads: {threads}, peak {peak:.0f} GFLOP/s", rows)


if __name__ == "__main__":
    main()
