"""Apply in process, by the kernels and in NumPy, against OpenBLAS's sgemm and PEFT's branch on torch."""

import contextlib
import os

from measure import in_turns, report

import ml_dtypes
import numpy as np

from bonsai_lora.core import backend, definition

SHAPES = [(4096, 4096, 16), (4096, 12288, 16), (12288, 4096, 64)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ROWS = [1, 8, 32, 256]
FACTORS = np.ones(1, np.float32)


def peak_gflops() -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1024, 1024)).astype(np.float32) for _ in range(2))
    out = np.empty_like(a)
    return 2 * 1024**3 / in_turns({"matmul": lambda: np.matmul(a, b, out=out)})["matmul"] / 1e9


def torch_branch(a_matrix, b_matrix, x):
    """PEFT's branch, `lora_B(lora_A(dropout(x))) * scaling`, without the base layer beside it."""
    import torch

    torch.set_num_threads(int(os.environ["OPENBLAS_NUM_THREADS"]))
    down = torch.nn.Linear(a_matrix.shape[1], a_matrix.shape[0], bias=False)
    up = torch.nn.Linear(b_matrix.shape[1], b_matrix.shape[0], bias=False)
    down.weight.data = torch.from_numpy(a_matrix.copy())
    up.weight.data = torch.from_numpy(b_matrix.copy())
    inputs = torch.from_numpy(x)

    def run():
        with torch.no_grad():
            return up(down(inputs)) * 2.0

    return run


def measured(a_matrix, b_matrix, x) -> dict[str, float]:
    """Return the median seconds of each rival."""
    kernels = backend.running()
    assert kernels is not None, "the kernels cannot run here"
    ours = kernels.make_apply(a_matrix, b_matrix)
    runs = {
        "kernels": lambda: ours(x, FACTORS),
        "NumPy": lambda: definition.apply(a_matrix, b_matrix, x, FACTORS),
    }
    if a_matrix.dtype == np.float32:
        with contextlib.suppress(ImportError):
            runs["PEFT branch"] = torch_branch(a_matrix, b_matrix, x)
    return in_turns(runs, seconds=0.3 * len(runs))


def main() -> None:
    rng = np.random.default_rng(1)
    peak = peak_gflops()
    rows = []
    for d_in, d_out, rank in SHAPES:
        for dtype in DTYPES:
            a_matrix = rng.standard_normal((rank, d_in)).astype(dtype)
            b_matrix = rng.standard_normal((d_out, rank)).astype(dtype)
            for count in ROWS:
                x = rng.standard_normal((count, d_in)).astype(np.float32)
                seconds = measured(a_matrix, b_matrix, x)
                operations = 2 * count * rank * (d_in + d_out)
                rows.append(
                    {
                        "shape": f"{d_in}→{d_out} r{rank}",
                        "A and B": np.dtype(dtype).name,
                        "rows": count,
                        "kernels µs": seconds["kernels"] * 1e6,
                        "of sgemm": operations / seconds["kernels"] / 1e9 / peak,
                        "NumPy / kernels": seconds["NumPy"] / seconds["kernels"],
                        "PEFT / kernels": seconds["PEFT branch"] / seconds["kernels"]
                        if "PEFT branch" in seconds
                        else "",
                    }
                )
    report(f"Apply, one thread; sgemm of 1024³: {peak:.0f} GFLOP/s", rows)


if __name__ == "__main__":
    main()
