"""Run every benchmark, each in a process of its own; JSON goes to benchmarks/results/."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = [
    "initialise",
    "apply",
    "mixed",
    "merge",
    "lab",
    "extract",
    "store",
    "dequantize",
    "open_gguf",
    "merged",
    "merged_gguf",
    "overload",
    "stages",
    "throughput",
    "token_latency",
    "scaling",
]


def main() -> int:
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    failed = 0
    for name in SCRIPTS:
        command = [
            sys.executable,
            str(HERE / f"{name}.py"),
            "--json",
            str(results / f"{name}.json"),
        ]
        failed |= subprocess.run(command, check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
