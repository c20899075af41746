"""A batch of 64 rows over 1, 8 and 64 sets of rank 8 to 64: against 64 applies and against PEFT.

In process: our mixed batch, PEFT's `adapter_names` on torch CPU, and the time it takes to read the
adapters once. Over loopback: one mixed request against 64 requests of one row.
"""

import contextlib
import os
import tempfile

from measure import in_turns, report
from server import serving

import httpx
import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.batch import Segment, apply_segments, rows_of
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.formats import safetensors

WIDTH, ROWS = 4096, 64
RANKS = (8, 16, 32, 64)
BINARY = {"Content-Type": "application/vnd.safetensors"}


def adapters(count: int) -> list[LoraAdapter]:
    rng = np.random.default_rng(count)
    made = []
    for number in range(count):
        config = LoraConfig(rank=RANKS[number % len(RANKS)], alpha=16.0)
        a_matrix = rng.standard_normal((config.rank, WIDTH)).astype(np.float32)
        b_matrix = rng.standard_normal((WIDTH, config.rank)).astype(np.float32)
        made.append(LoraAdapter(config, a_matrix, b_matrix, config.scaling))
    return made


def peft_layer(made: list[LoraAdapter], names: list[str]):
    """Return PEFT's forward over a base layer that costs nothing."""
    import torch
    from peft.tuners.lora.layer import Linear

    torch.set_num_threads(int(os.environ["OPENBLAS_NUM_THREADS"]))

    class Free(torch.nn.Linear):
        def forward(self, _):
            return self.zeros

    base = Free(1, 1, bias=False)
    base.in_features = base.out_features = WIDTH
    base.weight = torch.nn.Parameter(torch.empty(1, 1).expand(WIDTH, WIDTH), requires_grad=False)
    base.zeros = torch.zeros(ROWS, WIDTH)
    layer = None
    for number, one in enumerate(made):
        name = f"set{number}"
        about = {"r": one.rank, "lora_alpha": 16, "config": _peft_config(one.rank)}
        if layer is None:
            layer = Linear(base, name, **about)
        else:
            layer.update_layer(name, **about)
        layer.lora_A[name].weight.data = torch.from_numpy(one.a_matrix)
        layer.lora_B[name].weight.data = torch.from_numpy(one.b_matrix)
    layer.eval()

    def run(x):
        with torch.inference_mode():
            return layer(x, adapter_names=names)

    return run, torch.from_numpy


def _peft_config(rank: int):
    from peft import LoraConfig as PeftConfig

    return PeftConfig(r=rank, lora_alpha=16, init_lora_weights=False)


def in_process(count: int) -> dict[str, object]:
    made = adapters(count)
    owners = np.random.default_rng(9).permutation(np.arange(ROWS) % count)
    x = np.random.default_rng(3).standard_normal((ROWS, WIDTH)).astype(np.float32)
    segments = [
        Segment(one, rows_of(np.flatnonzero(owners == number).tolist()), 1.0)
        for number, one in enumerate(made)
    ]
    matrices = [matrix for one in made for matrix in (one.a_matrix, one.b_matrix)]
    rivals = {
        "mixed": lambda: apply_segments(x, segments, WIDTH),
        "row by row": lambda: [made[owner].apply(x[row]) for row, owner in enumerate(owners)],
        "read": lambda: [matrix.sum() for matrix in matrices],
    }
    with contextlib.suppress(ImportError):
        run, tensor = peft_layer(made, [f"set{owner}" for owner in owners])
        theirs = tensor(x)
        error = np.abs(run(theirs).numpy() - apply_segments(x, segments, WIDTH)).max()
        assert error < 1e-2, error
        rivals["PEFT"] = lambda: run(theirs)
    seconds = in_turns(rivals, seconds=3.0)
    return {
        "sets": count,
        "mixed ms": seconds["mixed"] * 1e3,
        "row by row / mixed": seconds["row by row"] / seconds["mixed"],
        "PEFT / mixed": seconds["PEFT"] / seconds["mixed"] if "PEFT" in seconds else "",
        "mixed / reading the adapters": seconds["mixed"] / seconds["read"],
    }


def over_loopback(count: int) -> dict[str, object]:
    made = adapters(count)
    owners = np.random.default_rng(9).permutation(np.arange(ROWS) % count)
    x = np.random.default_rng(3).standard_normal((ROWS, WIDTH)).astype(np.float32)
    with (
        tempfile.TemporaryDirectory() as store,
        serving("--store", store) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for number, one in enumerate(made):
            client.post("/v1/sets", json={"name": f"set{number}"}).raise_for_status()
            tensors = {"lora_A": one.a_matrix, "lora_B": one.b_matrix}
            path = f"/v1/sets/set{number}/adapters/q_proj?alpha=16"
            client.put(path, content=safetensors.encode(tensors), headers=BINARY)
        sets = "[" + ",".join(f'"set{owner}"' for owner in owners) + "]"
        whole = safetensors.encode({"inputs": x}, {"module": "q_proj", "sets": sets})
        single = [safetensors.encode({"inputs": row}) for row in x]

        def separate() -> None:
            for owner, body in zip(owners, single, strict=True):
                path = f"/v1/sets/set{owner}/adapters/q_proj/apply"
                client.post(path, content=body, headers=BINARY).raise_for_status()

        seconds = in_turns(
            {
                "mixed": lambda: client.post("/v1/apply", content=whole, headers=BINARY),
                "separate": separate,
            },
            seconds=4.0,
        )
    return {
        "mixed request ms": seconds["mixed"] * 1e3,
        "64 requests / mixed": seconds["separate"] / seconds["mixed"],
    }


def main() -> None:
    rows = [{**in_process(count), **over_loopback(count)} for count in (1, 8, 64)]
    report(f"A mixed batch of {ROWS} rows, {WIDTH}→{WIDTH}, ranks {RANKS}", rows)


if __name__ == "__main__":
    main()
