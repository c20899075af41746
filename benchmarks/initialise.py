"""Drawing all A matrices of a Qwen3-8B set (rank 16) against a plain Python loop."""

import time

from measure import in_turns, report

import numpy as np

from bonsai_lora.core import kaiming
from bonsai_lora.core.shapes import MODELS

RANK = 16
MASK = (1 << 64) - 1


def plain_loop(count: int) -> None:
    state = 88172645463325252
    out = np.empty(count, np.float32)
    for index in range(count):
        state ^= (state << 13) & MASK
        state ^= state >> 7
        state ^= (state << 17) & MASK
        out[index] = state


def main() -> None:
    model = MODELS["qwen3-8b"]
    shapes = {**model.attention.modules(), **model.mlp.modules()}
    values = model.num_layers * RANK * sum(d_in for d_in, _ in shapes.values())

    def ours_uncached() -> None:
        for d_in, d_out in shapes.values():
            kaiming._draw(d_in, d_out, RANK)

    def ours() -> None:
        kaiming._draw_cached.cache_clear()
        for _ in range(model.num_layers):
            for d_in, d_out in shapes.values():
                kaiming.kaiming_uniform(d_in, d_out, RANK)

    seconds = in_turns({"one layer": ours_uncached, "whole set": ours})
    sample = 100_000
    started = time.perf_counter()
    plain_loop(sample)
    loop = (time.perf_counter() - started) * values / sample
    report(
        "Initialising a Qwen3-8B set, rank 16",
        [
            {"way": "plain Python loop (extrapolated from 100,000 values)", "ms": loop * 1e3, "ratio": 1.0},
            {"way": "jumped lanes, every layer drawn", "ms": seconds["one layer"] * model.num_layers * 1e3,
             "ratio": loop / seconds["one layer"] / model.num_layers},
            {"way": "as it is: cached by shape", "ms": seconds["whole set"] * 1e3, "ratio": loop / seconds["whole set"]},
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
