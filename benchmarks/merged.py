"""Downloading a merged 2 GB bfloat16 checkpoint over loopback, against cp and PEFT on torch."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from measure import report
from server import serving, worker_of

import ml_dtypes
import numpy as np

from bonsai_lora.core.shapes import AttentionShape, MlpShape, layered
from bonsai_lora.formats import safetensors

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 2048, 6144, 18, 16, 32768
RANK = 16
ROUNDS = 3
SHARDS = 2


def write_base(folder: Path) -> None:
    """Write a Qwen3 checkpoint with random weights, about 2 GB in two shards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    shapes = {name: (d_out, d_in) for name, (d_in, d_out) in module_shapes().items()}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    tensors |= {f"{name}.weight": shape for name, shape in shapes.items()}
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = (128,)
    tensors |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    noise = (rng.standard_normal(1 << 24, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    names = list(tensors)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        with (folder / file).open("wb") as out:
            layout = {name: ("BF16", tensors[name]) for name in part}
            out.write(safetensors.encode_header(layout, {"format": "pt"}))
            for name in part:
                count = int(np.prod(tensors[name]))
                for start in range(0, count, len(noise)):
                    out.write(safetensors.as_bytes(noise[: min(len(noise), count - start)]))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
                "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS, "num_key_value_heads": 8, "head_dim": 128,
                "vocab_size": VOCABULARY, "tie_word_embeddings": False,
            }
        )
    )  # fmt: skip


def module_shapes() -> dict[str, tuple[int, int]]:
    attention = AttentionShape(HIDDEN, HEADS, num_kv_heads=8, head_dim=128).modules()
    return layered({**attention, **MlpShape(HIDDEN, INNER).modules()}, LAYERS)


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(2)
    tensors = {}
    for module, (d_in, d_out) in module_shapes().items():
        for half, shape in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
    (folder / "adapter_model.safetensors").write_bytes(
        safetensors.encode(tensors, {"format": "pt"})
    )
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 32, "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


class PrivateMemory:
    """The most private (dirty) memory that a process had, sampled."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            try:
                text = Path(f"/proc/{self._pid}/smaps_rollup").read_text()
            except OSError:
                return
            self.peak = max(
                self.peak,
                sum(
                    int(line.split()[1]) * 1024
                    for line in text.splitlines()
                    if line.startswith("Private_Dirty")
                ),
            )


PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def timed(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        base, adapter = folder / "bases" / "base", folder / "adapter"
        write_base(base)
        write_adapter(adapter)
        files = [path.name for path in base.iterdir()]
        size = sum(path.stat().st_size for path in base.iterdir())
        os.sync()
        times: dict[str, list[float]] = {"cp": [], "to /dev/null": [], "to files": []}
        with serving("--store", str(folder / "store"), "--bases", str(folder / "bases")) as (
            url,
            process,
        ):
            subprocess.run(
                ["curl", "-sf", "-o", "/dev/null", "-X", "PUT", f"{url}/v1/sets/s",
                 "-F", f"adapter_config=@{adapter}/adapter_config.json",
                 "-F", f"adapter_model=@{adapter}/adapter_model.safetensors"], check=True)  # fmt: skip
            prefix = f"{url}/v1/bases/base/merged/s"

            def fetch(target: Path | None) -> None:
                for file in files:
                    out = "/dev/null" if target is None else str(target / file)
                    subprocess.run(["curl", "-sf", "-o", out, f"{prefix}/{file}"], check=True)

            fetch(None)
            with PrivateMemory(worker_of(process)) as memory:
                for _ in range(ROUNDS):
                    times["cp"].append(timed(lambda: shutil.copytree(base, folder / "copy")))
                    shutil.rmtree(folder / "copy")
                    times["to /dev/null"].append(timed(lambda: fetch(None)))
                    (folder / "out").mkdir()
                    times["to files"].append(timed(lambda: fetch(folder / "out")))
                    shutil.rmtree(folder / "out")
        middle = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
        rows = [{"way": key, "s": value, "of cp": value / middle["cp"],
                 "private MB": memory.peak / 1e6 if key != "cp" else ""}
                for key, value in middle.items()]  # fmt: skip
        rows += peft_row(folder, base, adapter, middle["cp"])
    report(f"Merged checkpoint of {size / 1e9:.2f} GB, bfloat16, rank {RANK}", rows)


def peft_row(folder: Path, base: Path, adapter: Path, copy: float) -> list[dict[str, object]]:
    command = [sys.executable, "-c", PEFT, str(base), str(adapter), str(folder / "peft")]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    with PrivateMemory(process.pid) as memory:
        if process.wait(timeout=300) != 0:
            return []
    seconds = time.perf_counter() - started
    return [{"way": "PEFT merge_and_unload + save_pretrained", "s": seconds, "of cp": seconds / copy,
             "private MB": memory.peak / 1e6}]  # fmt: skip


if __name__ == "__main__":
    main()
