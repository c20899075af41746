"""How many sums a tile of a product has: as many as fit in the vector registers."""

from bonsai_lora.kernels.target import Target

HEIGHTS = (6, 2, 1)
"""Rows of a tile: 6 take 4 vectors (2 where registers are few), 1 takes 8."""
MERGED_HEIGHTS = (4, 1)
"""Where a base is read and written too: fewer rows that lie apart."""
_MOST_VECTORS = 8


def vectors_of(target: Target, height: int) -> int:
    """Return how many vectors of sums each of a tile's rows may have: a power of two."""
    width = _MOST_VECTORS
    while width > 1 and width * height > target.sums:
        width //= 2
    return width
