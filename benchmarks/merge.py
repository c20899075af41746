"""Merging 12288 x 4096 in place, against a plain copy of the same bytes."""

from measure import in_turns, report

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import BFLOAT16, FLOAT16, FLOAT32
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.merge import blocks

D_OUT, D_IN = 12288, 4096
RANKS = (8, 16, 64)


def product(a_matrix, b_matrix, scratch) -> None:
    """The part that no merge can leave out, in blocks that stay in the cache."""
    for rows, _ in blocks(D_OUT, D_IN, most=1 << 17):
        np.matmul(b_matrix[rows], a_matrix, out=scratch[: rows.stop - rows.start])


def main() -> None:
    scratch = np.empty(((1 << 17) // D_IN, D_IN), np.float32)
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
                    "two threads": lambda a=adapter, w=weights: a.merge_into_weights(w, threads=2),
                    "product": lambda a=a_matrix, b=b_matrix: product(a, b, scratch),
                    "copy": lambda w=weights, t=target: np.copyto(t, w),
                },
                seconds=3.0,
            )
            rows.append(
                {
                    "rank": rank,
                    "dtype": str(dtype),
                    "MB": weights.nbytes / 1e6,
                    "merge ms": seconds["merge"] * 1e3,
                    "copy ms": seconds["copy"] * 1e3,
                    "merge / copy": seconds["merge"] / seconds["copy"],
                    "two threads / copy": seconds["two threads"] / seconds["copy"],
                    "NumPy's B·A alone / copy": seconds["product"] / seconds["copy"],
                }
            )
    report(f"Merge of {D_OUT} x {D_IN}", rows)


if __name__ == "__main__":
    main()
