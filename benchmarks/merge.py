"""Merging 12288 x 4096, rank 16, against a plain copy of the same bytes."""

from measure import in_turns, report

import numpy as np

from app.core.adapter import LoraAdapter
from app.core.cast import BFLOAT16, FLOAT16, FLOAT32
from app.core.config import LoraConfig
from app.core.merge import LONE_BLOCK_VALUES, blocks
from app.core.products import multiply_outer

D_OUT, D_IN, RANK = 12288, 4096, 16


def product(a_matrix, b_matrix, scratch) -> None:
    """The part that no merge can leave out, in blocks that stay in the cache."""
    for rows, _ in blocks(D_OUT, D_IN, most=LONE_BLOCK_VALUES):
        multiply_outer(b_matrix[rows], a_matrix, scratch[: rows.stop - rows.start])


def main() -> None:
    scratch = np.empty((LONE_BLOCK_VALUES // D_IN, D_IN), np.float32)
    rng = np.random.default_rng(1)
    config = LoraConfig(rank=RANK, alpha=32.0)
    a_matrix = (rng.standard_normal((RANK, D_IN)) * 1e-3).astype(np.float32)
    b_matrix = (rng.standard_normal((D_OUT, RANK)) * 1e-3).astype(np.float32)
    adapter = LoraAdapter(config, a_matrix, b_matrix, config.scaling)
    rows = []
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        weights = rng.standard_normal((D_OUT, D_IN), np.float32).astype(dtype)
        target = np.empty_like(weights)
        seconds = in_turns(
            {
                "merge": lambda w=weights: adapter.merge_into_weights(w),
                "two threads": lambda w=weights: adapter.merge_into_weights(w, threads=2),
                "product": lambda: product(a_matrix, b_matrix, scratch),
                "copy": lambda w=weights, t=target: np.copyto(t, w),
            },
            seconds=4.0,
        )
        rows.append(
            {
                "dtype": str(dtype),
                "MB": weights.nbytes / 1e6,
                "merge ms": seconds["merge"] * 1e3,
                "copy ms": seconds["copy"] * 1e3,
                "merge / copy": seconds["merge"] / seconds["copy"],
                "two threads / copy": seconds["two threads"] / seconds["copy"],
                "B·A alone / copy": seconds["product"] / seconds["copy"],
            }
        )
    report(f"Merge of {D_OUT} x {D_IN}, rank {RANK}", rows)


if __name__ == "__main__":
    main()
