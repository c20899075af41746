"""Downloading the first 2 GB of a 1-bit model merged to F16, over loopback, against cp.

The base has the shapes of Bonsai 8B and random signs: 1.15 GB as Q1_0, 16 GB merged, of which every
projection is adapted. `--layers N` makes it smaller.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from measure import report
from merged import PrivateMemory, timed
from server import serving, worker_of

import numpy as np

from bonsai_lora.core.shapes import AttentionShape, MlpShape, layered
from bonsai_lora.formats import gguf_names, gguf_writer, safetensors
from bonsai_lora.formats.gguf_types import BY_NAME

HIDDEN, INNER, LAYERS, HEADS, KEYS, WIDTH, VOCABULARY = 4096, 12288, 36, 32, 8, 128, 151_936
RANK = 16
ROUNDS = 3
LENGTH = 2_000_000_000


def modules_of(layers: int) -> dict[str, tuple[int, int]]:
    attention = AttentionShape(HIDDEN, HEADS, num_kv_heads=KEYS, head_dim=WIDTH).modules()
    return layered({**attention, **MlpShape(HIDDEN, INNER).modules()}, layers)


def write_base(path: Path, layers: int) -> None:
    """Write a Qwen3 model whose matrices are Q1_0, with random signs and scales."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (d_out, d_in) for name, (d_in, d_out) in modules_of(layers).items()
    }
    shapes |= {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (WIDTH,)
    layout = {}
    for name, shape in shapes.items():
        found = gguf_names.to_gguf("qwen3", name)
        assert found is not None
        layout[found.name] = BY_NAME["F32" if len(shape) == 1 else "Q1_0"], shape
    plan = gguf_writer.plan(keys_of(layers), layout)
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (1 << 20, 18), np.uint8)
    blocks[:, :2] = rng.uniform(0.01, 0.05, (1 << 20, 1)).astype("<f2").view(np.uint8)
    noise = blocks.tobytes()
    with path.open("wb") as out:
        out.write(plan.head)
        for info in plan.tensors.values():
            out.seek(info.start)
            size = info.stop - info.start
            if info.type.name == "F32":
                out.write(np.ones(size // 4, np.float32).tobytes())
                continue
            for start in range(0, size, len(noise)):
                out.write(noise[: min(len(noise), size - start)])
        out.truncate(plan.total_bytes)


def keys_of(layers: int) -> dict[str, gguf_writer.Writable]:
    numbers = {
        "block_count": layers, "context_length": 65_536, "embedding_length": HIDDEN,
        "feed_forward_length": INNER, "attention.head_count": HEADS,
        "attention.head_count_kv": KEYS, "attention.key_length": WIDTH,
        "attention.value_length": WIDTH,
    }  # fmt: skip
    return {
        "general.architecture": "qwen3",
        "general.file_type": np.uint32(40),
        "general.quantization_version": np.uint32(2),
        **{f"qwen3.{key}": np.uint32(value) for key, value in numbers.items()},
        "qwen3.rope.freq_base": np.float32(1e6),
        "qwen3.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "tokenizer.ggml.model": "none",
    }


def write_adapter(folder: Path, layers: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(2)
    tensors = {}
    for module, (d_in, d_out) in modules_of(layers).items():
        for half, shape in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
    (folder / "adapter_model.safetensors").write_bytes(safetensors.encode(tensors))
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    layers = parser.parse_known_args()[0].layers  # `report` reads --json
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        (folder / "bases").mkdir()
        base = folder / "bases" / "bonsai.gguf"
        write_base(base, layers)
        write_adapter(folder / "adapter", layers)
        os.sync()
        report(
            f"First 2 GB of a {base.stat().st_size / 1e9:.2f} GB Q1_0 model, merged", run(folder)
        )


def run(folder: Path) -> list[dict[str, object]]:
    options = ("--store", str(folder / "store"), "--bases", str(folder / "bases"))
    with serving(*options) as (url, process):
        put = ["curl", "-sf", "-o", "/dev/null", "-X", "PUT", f"{url}/v1/sets/s"]
        for part, file in (("config", "config.json"), ("model", "model.safetensors")):
            put += ["-F", f"adapter_{part}=@{folder}/adapter/adapter_{file}"]
        subprocess.run(put, check=True)
        prefix = f"{url}/v1/bases/bonsai/merged/s"
        part, copy = folder / "part", folder / "copy"

        def fetch(file: str, target: Path) -> None:
            last = f"0-{LENGTH - 1}"
            command = ["curl", "-sf", "-r", last, "-o", str(target), f"{prefix}/{file}"]
            subprocess.run(command, check=True)

        shard = first_shard(url)
        ways = {
            "cp": lambda: shutil.copyfile(part, copy),
            "GGUF, F16": lambda: fetch("bonsai.gguf?dtype=F16", part),
            "GGUF, F16, widen=all": lambda: fetch("bonsai.gguf?dtype=F16&widen=all", part),
            "GGUF, Q8_0": lambda: fetch("bonsai.gguf?dtype=Q8_0", part),
            "safetensors, BF16": lambda: fetch(shard, part),
        }
        fetch("bonsai.gguf?dtype=F16", part)
        times: dict[str, list[float]] = {way: [] for way in ways}
        with PrivateMemory(worker_of(process)) as memory:
            for _ in range(ROUNDS):
                for way, act in ways.items():
                    times[way].append(timed(act))
        middle = {way: sorted(values)[len(values) // 2] for way, values in times.items()}
    return [
        {"way": way, "s": seconds, "of cp": seconds / middle["cp"],
         "private MB": memory.peak / 1e6 if way != "cp" else ""}
        for way, seconds in middle.items()
    ]  # fmt: skip


def first_shard(url: str) -> str:
    listed = subprocess.run(
        ["curl", "-sf", f"{url}/v1/bases/bonsai/merged/s"], check=True, capture_output=True
    )
    names = [one["name"] for one in json.loads(listed.stdout)["files"]]
    return next(name for name in names if name.endswith(".safetensors"))


if __name__ == "__main__":
    main()
