"""Element-wise merging: which entries of a matrix are kept, and how several matrices become one.

A matrix comes as a sequence of row blocks that can be made again, so that it need not fit in
memory. Random numbers are drawn in row order from a generator of its own per matrix: they depend
neither on the size of the blocks nor on threads.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.cast import Floats
from bonsai_lora.core.factors import Values
from bonsai_lora.core.recipe import Recipe

Blocks = Callable[[], Iterator[Floats]]
"""Makes the row blocks of a matrix, from the first to the last."""
Sparsify = Callable[[Floats], Floats]
"""Takes the row blocks in order, and returns each with entries set to zero."""
Start = Callable[[], Sparsify]
"""Begins to read the matrix once more."""

_BIN_BITS = 16
_BINS = 1 << 15
"""The upper half of a float32 without its sign, which orders non-negative numbers."""


def order_statistics(blocks: Blocks, ranks: Sequence[int]) -> list[float]:
    """Return the |entries| at these ascending positions, exactly, in two passes.

    The first pass counts entries by their upper 16 bits, the second collects those in the bins that
    hold the positions.
    """
    counts = np.zeros(_BINS, np.int64)
    for block in blocks():
        counts += np.bincount(_bits(block) >> _BIN_BITS, minlength=_BINS)
    ends = np.cumsum(counts)
    bins = np.searchsorted(ends, ranks, side="right")
    found: dict[int, list[Floats]] = {int(one): [] for one in bins}
    for block in blocks():
        bits = _bits(block)
        upper = bits >> _BIN_BITS
        for one, parts in found.items():
            parts.append(bits[upper == one].view(np.float32))
    below = ends - counts
    return [
        float(np.partition(np.concatenate(found[int(one)]), place)[place])
        for one, place in zip(bins, ranks - below[bins], strict=True)
    ]


def _bits(block: Floats) -> npt.NDArray[np.uint32]:
    return np.abs(block).reshape(-1).view(np.uint32)


def by_magnitude(blocks: Blocks, size: int, density: float) -> Start:
    """Keep the int(density * size) largest entries, and those equal to the smallest of these."""
    kept = int(density * size)
    if kept == size:
        return lambda: lambda block: block
    if kept == 0:
        return lambda: np.zeros_like
    (least,) = order_statistics(blocks, [size - kept])
    return lambda: lambda block: block * (np.abs(block) >= least)


def without_outliers(blocks: Blocks, size: int, density: float, gamma: float) -> Start:
    """Drop the gamma * size largest entries and the smallest, so that density * size are kept.

    mergekit's magnitude_outliers (Davari and Belilovsky 2023), except that a gamma * size below 1
    drops no outlier instead of everything.
    """
    top = int(gamma * size)
    bottom = size - int(density * size) - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    if bottom + top >= size:
        return lambda: np.zeros_like
    least, most = order_statistics(blocks, [bottom, size - top - 1])

    def sparsify(block: Floats) -> Floats:
        sizes = np.abs(block)
        return block * ((sizes >= least) & (sizes <= most))

    return lambda: sparsify


def at_random(key: str, density: float) -> Start:
    """Keep each entry with this probability and divide it by it (DARE: Yu et al. 2023)."""
    factor = np.float32(1 / density)

    def start() -> Sparsify:
        draws = Draws(key)
        return lambda block: block * (draws.uniform(block.shape) < density) * factor

    return start


def by_rank_in_row(key: str, blocks: Blocks, density: float, epsilon: float) -> Start:
    """Keep entries with a probability that grows with their rank in the row (DELLA, as mergekit).

    From density - epsilon for the smallest to density + epsilon for the largest (Deep et al. 2024).
    The rest is multiplied so that the sum of |entries| stays. Which entries are kept is remembered,
    a bit for each, as ranking them takes long; blocks must have the same size in each pass.
    """
    draws = Draws(key)
    before = after = 0.0
    masks = []
    for block in blocks():
        kept = draws.uniform(block.shape) < _chances(block, density, epsilon)
        sizes = np.abs(block)
        before += float(sizes.sum(dtype=np.float64))
        after += float((sizes * kept).sum(dtype=np.float64))
        masks.append(np.packbits(kept))
    scale = np.float32(before / after if after else 1.0)

    def start() -> Sparsify:
        rest = iter(masks)
        return lambda block: block * _unpacked(next(rest), block.shape) * scale

    return start


def _unpacked(mask: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    return np.unpackbits(mask, count=int(np.prod(shape))).reshape(shape)


def _chances(block: Floats, density: float, epsilon: float) -> Floats:
    order = np.argsort(np.abs(block), axis=1, kind="stable")
    steps = np.arange(block.shape[1], dtype=np.float32) / np.float32(max(1, block.shape[1] - 1))
    shares = np.empty_like(block)
    np.put_along_axis(shares, order, steps[None], axis=1)
    return np.float32(density - epsilon) + np.float32(2 * epsilon) * shares


class Draws:
    """Uniform random numbers that are the same on every machine: raw bits of Philox 4x64."""

    def __init__(self, key: str) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, np.dtype("<u8")))

    def uniform(self, shape: tuple[int, ...]) -> Values:
        """Return numbers in [0, 1) in row order."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(11)) * np.float64(2.0**-53)).reshape(shape)


def weighted_sum(parts: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Return the sum of the parts times their weights."""
    total = np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += part * np.float32(weight)
    return total


def disjoint_mean(parts: Sequence[Floats], weights: Sequence[float], *, by_count: bool) -> Floats:
    """Return the mean of the weighted entries whose sign is the majority's, as peft 0.21.2 does.

    The majority is the sign of the sum of the unweighted entries, or with `by_count` of their
    signs; 0 counts as positive (Yadav et al. 2023, with weights applied after the election).
    """
    votes = np.zeros_like(parts[0])
    for part in parts:
        votes += np.sign(part) if by_count else part
    is_positive = votes >= 0
    total, count = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agrees = _agrees(part, is_positive)
        total += part * np.float32(weight) * agrees
        count += agrees
    result: Floats = np.divide(total, np.maximum(count, np.float32(1)))
    return result


def weighted_consensus(parts: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Return the sum of agreeing weighted entries over the sum of their weights, as mergekit does.

    The sign is that of the sum of the weighted entries; 0 counts as positive.
    """
    weighted = [part * np.float32(weight) for part, weight in zip(parts, weights, strict=True)]
    is_positive = np.sum(weighted, axis=0) >= 0
    total, shares = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for part, weight in zip(weighted, weights, strict=True):
        agrees = _agrees(part, is_positive)
        total += part * agrees
        shares += np.float32(weight) * agrees
    result: Floats = np.divide(total, np.where(shares == 0, np.float32(1), shares))
    return result


def mean_of_agreeing(parts: Sequence[Values]) -> Values:
    """Return the mean of the entries whose sign is that of their sum (TIES, as KnOTS uses it).

    Where the sum is zero, the sign is that of all sums together.
    """
    total = np.sum(parts, axis=0)
    sign = np.sign(total)
    sign[sign == 0] = np.sign(sign.sum())
    agrees = [(np.sign(part) == sign) & (part != 0) for part in parts]
    kept = np.sum([np.where(one, part, 0.0) for one, part in zip(agrees, parts, strict=True)], 0)
    result: Values = kept / np.maximum(np.sum(agrees, axis=0), 1)
    return result


def _agrees(part: Floats, is_positive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which entries have the elected sign; zeros have none."""
    agrees: npt.NDArray[np.bool_] = ((part > 0) == is_positive) & (part != 0)
    return agrees


def prune_matrix(recipe: Recipe, blocks: Blocks, size: int, key: str) -> Start:
    """Return which entries of one summand the method keeps."""
    match recipe.method:
        case "linear":
            return lambda: lambda block: block
        case "breadcrumbs":
            return without_outliers(blocks, size, recipe.kept, recipe.outliers)
        case "della":
            return by_rank_in_row(key, blocks, recipe.kept, recipe.half_range)
        case "dare_linear" | "dare_ties" | "dare_linear_svd" | "dare_ties_svd":
            return at_random(key, recipe.kept)
    return by_magnitude(blocks, size, recipe.kept)


def merge_entries(parts: Sequence[Floats], weights: Sequence[float], recipe: Recipe) -> Floats:
    """Return one block of the result from the pruned blocks of the summands."""
    match recipe.method:
        case "ties" | "dare_ties" | "ties_svd" | "dare_ties_svd":
            return disjoint_mean(parts, weights, by_count=recipe.sign == "frequency")
        case "della":
            return weighted_consensus(parts, weights)
    return weighted_sum(parts, weights)
