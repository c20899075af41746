"""The element-wise methods: what each keeps of a summand, and how the kept entries become one."""

from collections.abc import Sequence

from bonsai_lora.core import prune
from bonsai_lora.core.cast import Floats
from bonsai_lora.core.recipe import Recipe


def prune_matrix(recipe: Recipe, blocks: prune.Blocks, size: int, key: str) -> prune.Start:
    """Return which entries of one summand the method keeps."""
    match recipe.method:
        case "linear":
            return lambda: lambda block: block
        case "breadcrumbs":
            return prune.without_outliers(blocks, size, recipe.kept, recipe.outliers)
        case "della":
            return prune.by_rank_in_row(key, blocks, recipe.kept, recipe.half_range)
        case "dare_linear" | "dare_ties" | "dare_linear_svd" | "dare_ties_svd":
            return prune.at_random(key, recipe.kept)
    return prune.by_magnitude(blocks, size, recipe.kept)


def merge_entries(parts: Sequence[Floats], weights: Sequence[float], recipe: Recipe) -> Floats:
    """Return one block of the result from the pruned blocks of the summands."""
    match recipe.method:
        case "ties" | "dare_ties" | "ties_svd" | "dare_ties_svd":
            return prune.disjoint_mean(parts, weights, by_count=recipe.sign == "frequency")
        case "della":
            return prune.weighted_consensus(parts, weights)
    return prune.weighted_sum(parts, weights)
