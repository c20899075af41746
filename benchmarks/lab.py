"""Combining and comparing sets of Qwen3-8B's shapes, against PEFT and against dense deltas.

PEFT and dense deltas are measured on one module (q_proj, 4096 x 4096) and so is the service beside
them; PEFT's row needs torch and peft.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from measure import in_turns, report

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import BFLOAT16
from bonsai_lora.core.combine import combine
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.recipe import Recipe
from bonsai_lora.core.shapes import MODELS
from bonsai_lora.core.similarity import similarity

RANK = 16
MODEL = MODELS["qwen3-8b"]
SHAPES = MODEL.modules()
THREADS = ThreadPoolExecutor(2)
WEIGHTS = (0.7, 0.3)


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


def one_module() -> list[dict[str, object]]:
    """Time q_proj (4096 x 4096) alone: this library, dense deltas in NumPy, PEFT."""
    rng = np.random.default_rng(1)
    pair = [make_adapter(rng, 4096, 4096) for _ in range(2)]
    rows: list[dict[str, object]] = []
    for method, options in (
        ("cat", {}),
        ("linear", {}),
        ("svd", {"rank": RANK}),
        ("ties_svd", {"rank": RANK, "density": 0.5}),
        ("dare_linear_svd", {"rank": RANK, "density": 0.5}),
    ):
        recipe = Recipe(method, **options)  # type: ignore[arg-type]

        def ours(recipe: Recipe = recipe) -> object:
            return combine("q_proj", pair, WEIGHTS, recipe, RANK)

        row: dict[str, object] = {
            "method": method,
            "ms": in_turns({"": ours}, seconds=0.5)[""] * 1e3,
            "dense NumPy ms": "",
        }
        if find_spec("peft"):
            row["PEFT ms"] = peft_seconds(pair, method) * 1e3
        if method == "svd":
            row["dense NumPy ms"] = seconds_of(lambda: dense_svd(pair)) * 1e3
        rows.append(row)
    return rows


def dense_svd(pair: list[LoraAdapter]) -> object:
    """Sum the deltas and decompose the sum."""
    total = np.zeros((4096, 4096), np.float32)
    for one, weight in zip(pair, WEIGHTS, strict=True):
        left = np.float32(weight * one.scaling) * one.b_matrix.astype(np.float32)
        total += left @ one.a_matrix.astype(np.float32)
    return np.linalg.svd(total, full_matrices=False)


def peft_seconds(pair: list[LoraAdapter], method: str) -> float:
    """Return how long PEFT's add_weighted_adapter takes for the same two adapters."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.set_num_threads(2)
    base = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False))
    config = PeftConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", PeftConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]))
    with torch.no_grad():
        for name, one in zip("ab", pair, strict=True):
            layer = model.base_model.model[0]
            layer.lora_A[name].weight.copy_(torch.from_numpy(one.a_matrix.astype(np.float32)))
            layer.lora_B[name].weight.copy_(torch.from_numpy(one.b_matrix.astype(np.float32)))
    with torch.no_grad():
        return seconds_of(
            lambda: model.add_weighted_adapter(
                ["a", "b"], list(WEIGHTS), "new", combination_type=method, density=0.5
            )
        )


def main() -> None:
    report(f"Qwen3-8B's {len(SHAPES)} modules, rank {RANK}, two threads", whole_model())
    report("One module, 4096 x 4096", one_module())


if __name__ == "__main__":
    main()
