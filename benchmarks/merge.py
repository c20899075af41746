"""Merging 12288 x 4096 in place, against a plain copy of the same bytes, and in NumPy."""

from concurrent.futures import ThreadPoolExecutor

from measure import in_turns, report

import numpy as np

from bonsai_lora.core import definition
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, FLOAT32
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.merge import blocks, merge_rows

D_OUT, D_IN = 12288, 4096
RANKS = (8, 16, 64)
THREADS = ThreadPoolExecutor(2)


def in_numpy(adapter, weights) -> None:
    """Merge by the definition, in the blocks of a merged file."""
    for block in blocks(D_OUT, D_IN):
        right, left = adapter.stored_factors_of(*block)
        definition.merge(weights[block], left, right, adapter.scaling, weights[block])


def in_threads(adapter, weights) -> None:
    """Merge with two threads, half of the rows each."""

    def merge(rows: slice) -> None:
        right, left = adapter.stored_factors_of(rows, slice(None))
        merge_rows(weights[rows], right, left, adapter.scaling, out=weights[rows])

    list(THREADS.map(merge, (slice(D_OUT // 2), slice(D_OUT // 2, None))))


def main() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for rank in RANKS:
        config = LoraConfig(rank=rank, alpha=2.0 * rank)
        a_matrix = (rng.standard_normal((rank, D_IN)) * 1e-3).astype(np.float32)
        b_matrix = (rng.standard_normal((D_OUT, rank)) * 1e-3).astype(np.float32)
        adapter = LoraAdapter(config, a_matrix, b_matrix, config.scaling)
        for dtype in (FLOAT32, BFLOAT16, FLOAT16):
            weights = rng.standard_normal((D_OUT, D_IN), np.float32).astype(dtype)
            target = np.empty_like(weights)
            seconds = in_turns(
                {
                    "merge": lambda a=adapter, w=weights: a.merge_into_weights(w),
                    "two threads": lambda a=adapter, w=weights: in_threads(a, w),
                    "copy": lambda w=weights, t=target: np.copyto(t, w),
                },
                seconds=2.0,
            )
            numpy = in_turns({"": lambda a=adapter, w=weights: in_numpy(a, w)}, seconds=0.1)[""]
            rows.append(
                {
                    "rank": rank,
                    "dtype": str(dtype),
                    "MB": weights.nbytes / 1e6,
                    "merge ms": seconds["merge"] * 1e3,
                    "copy ms": seconds["copy"] * 1e3,
                    "merge / copy": seconds["merge"] / seconds["copy"],
                    "two threads / copy": seconds["two threads"] / seconds["copy"],
                    "NumPy / merge": numpy / seconds["merge"],
                }
            )
    report(f"Merge of {D_OUT} x {D_IN}", rows)


if __name__ == "__main__":
    main()
