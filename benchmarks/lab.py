"""Combining and comparing sets of Qwen3-8B's shapes, against PEFT and against dense deltas.

PEFT and dense deltas are measured on single modules, and so is the service beside them, all in processor
time of one thread; PEFT's column needs torch and peft. `--modules` leaves the whole model out.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from measure import report

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import BFLOAT16
from bonsai_lora.core.combine import combine
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.recipe import OPTIONS, Recipe
from bonsai_lora.core.shapes import MODELS
from bonsai_lora.core.similarity import similarity

RANK = 16
MODEL = MODELS["qwen3-8b"]
SHAPES = MODEL.modules()
THREADS = ThreadPoolExecutor(2)
WEIGHTS = (0.7, 0.3)
SIZES = ((1024, 1024), (4096, 1024), (4096, 4096))
VALUES = {"rank": RANK, "density": 0.5}
OF_PEFT = {
    *("cat", "linear", "svd", "ties", "magnitude_prune", "dare_linear", "dare_ties"),
    *("ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd"),
}


def make_adapter(rng: np.random.Generator, d_in: int, d_out: int) -> LoraAdapter:
    """Return an adapter of noise, in bfloat16 as most are stored."""
    config = LoraConfig(rank=RANK, alpha=2.0 * RANK)
    a_matrix = rng.standard_normal((RANK, d_in), np.float32).astype(BFLOAT16)
    b_matrix = rng.standard_normal((d_out, RANK), np.float32).astype(BFLOAT16)
    return LoraAdapter(config, a_matrix, b_matrix, config.scaling)


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long `work` takes, once."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_seconds_of(work: Callable[[], object]) -> float:
    """Return the processor time of `work`, once: it hardly depends on what else runs."""
    started = time.process_time()
    work()
    return time.process_time() - started


def whole_model() -> list[dict[str, object]]:
    """Time all modules, two at a time."""
    rng = np.random.default_rng(1)
    sets = [{name: make_adapter(rng, *shape) for name, shape in SHAPES.items()} for _ in range(8)]
    rows: list[dict[str, object]] = []
    for method, options in (
        ("exact", {}),
        ("svd", {"rank": RANK}),
        ("svd", {"energy": 0.99}),
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("slerp", {}),
        ("tsv", {}),
        ("iso_c", {}),
        ("knots_ties", {}),
    ):
        recipe = Recipe(method, **options)  # type: ignore[arg-type]

        def one(name: str, recipe: Recipe = recipe) -> None:
            combine(name, [sets[0][name], sets[1][name]], WEIGHTS, recipe, RANK)

        seconds = min(seconds_of(lambda one=one: list(THREADS.map(one, SHAPES))) for _ in range(3))
        rows.append({"what": f"combine 2 sets: {method} {options or ''}", "s": seconds})
    for count in (2, 8):

        def compare(name: str, count: int = count) -> None:
            similarity([one[name] for one in sets[:count]])

        seconds = min(seconds_of(lambda: list(THREADS.map(compare, SHAPES))) for _ in range(3))
        rows.append({"what": f"compare {count} sets", "s": seconds})
    return rows


def one_module(d_in: int, d_out: int) -> list[dict[str, object]]:
    """Time every method on one module: this library, PEFT, and for svd dense deltas in NumPy."""
    rng = np.random.default_rng(1)
    pair = [make_adapter(rng, d_in, d_out) for _ in range(2)]
    rows: list[dict[str, object]] = []
    for method, taken in OPTIONS.items():
        options = {name: value for name, value in VALUES.items() if name in taken}
        recipe = Recipe(method, **options)  # type: ignore[arg-type]

        def ours(recipe: Recipe = recipe) -> object:
            return combine("q_proj", pair, WEIGHTS, recipe, RANK)

        row: dict[str, object] = {
            "method": method,
            "ms": min(cpu_seconds_of(ours) for _ in range(5)) * 1e3,
            "dense NumPy ms": "",
            "PEFT ms": "",
        }
        if find_spec("peft") and method in OF_PEFT:
            row["PEFT ms"] = peft_seconds(pair, method) * 1e3
        if method == "svd":
            row["dense NumPy ms"] = cpu_seconds_of(lambda: dense_svd(pair)) * 1e3
        rows.append(row)
    return rows


def dense_svd(pair: list[LoraAdapter]) -> object:
    """Sum the deltas and decompose the sum."""
    total = np.zeros((pair[0].d_out, pair[0].d_in), np.float32)
    for one, weight in zip(pair, WEIGHTS, strict=True):
        left = np.float32(weight * one.scaling) * one.b_matrix.astype(np.float32)
        total += left @ one.a_matrix.astype(np.float32)
    return np.linalg.svd(total, full_matrices=False)


def peft_seconds(pair: list[LoraAdapter], method: str) -> float:
    """Return how long PEFT's add_weighted_adapter takes for the same two adapters."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.set_num_threads(1)
    base = torch.nn.Sequential(torch.nn.Linear(pair[0].d_in, pair[0].d_out, bias=False))
    config = PeftConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", PeftConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]))
    with torch.no_grad():
        for name, one in zip("ab", pair, strict=True):
            layer = model.base_model.model[0]
            layer.lora_A[name].weight.copy_(torch.from_numpy(one.a_matrix.astype(np.float32)))
            layer.lora_B[name].weight.copy_(torch.from_numpy(one.b_matrix.astype(np.float32)))
    with torch.no_grad():
        return cpu_seconds_of(
            lambda: model.add_weighted_adapter(
                ["a", "b"], list(WEIGHTS), "new", combination_type=method, density=0.5
            )
        )


def main() -> None:
    if "--modules" not in sys.argv:
        report(f"Qwen3-8B's {len(SHAPES)} modules, rank {RANK}, two threads", whole_model())
    for d_in, d_out in SIZES:
        report(f"One module, {d_in} -> {d_out}", one_module(d_in, d_out))


if __name__ == "__main__":
    main()
