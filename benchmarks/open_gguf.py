"""Opening a 12 GB GGUF file with a vocabulary of 248,320 tokens: the first time, and when it is known.

The file has the tensors of Bonsai 27B, projections in Q2_0, as holes, and a header as large as a
real one: walking over the strings of the tokenizer is what takes time.
"""

import os
import tempfile
from pathlib import Path

from measure import in_turns, report

import numpy as np

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.gguf_base import GgufBase
from bonsai_lora.core.shapes import MODELS
from bonsai_lora.formats import gguf_writer
from bonsai_lora.formats.gguf_names import to_gguf
from bonsai_lora.formats.gguf_types import BY_NAME

VOCABULARY, MERGES = 248_320, 247_587
"""Of Qwen3.5."""
HIDDEN = 5120
NAME = "bonsai"


def write_base(path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = [f"token{number:x}" * (1 + number % 2) for number in range(VOCABULARY)]
    keys: dict[str, gguf_writer.Writable] = {
        "general.architecture": "qwen35",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.ones(VOCABULARY, np.int32),
        "tokenizer.ggml.merges": [f"{tokens[one]} {one:x}" for one in range(MERGES)],
        "tokenizer.chat_template": "x" * 8000,
        "general.alignment": np.uint32(32),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output.weight": (VOCABULARY, HIDDEN),
    }
    for module, (d_in, d_out) in MODELS["bonsai-27b"].modules().items():
        found = to_gguf("qwen35", f"{module}.weight")
        assert found is not None
        shapes[found.name] = d_out, d_in
    for layer in rng.permutation(64):
        shapes[f"blk.{layer}.attn_norm.weight"] = (HIDDEN,)
    layout = {
        name: (BY_NAME["F32" if len(shape) == 1 else "Q2_0" if "blk" in name else "F16"], shape)
        for name, shape in shapes.items()
    }
    made = gguf_writer.plan(keys, layout)
    with path.open("wb") as out:
        out.write(made.head)
        out.truncate(made.total_bytes)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        path = folder / f"{NAME}.gguf"
        write_base(path)
        known = BaseFolder(folder)
        base = known.get(NAME)
        assert isinstance(base, GgufBase)
        size = base.header.data_start

        def cold() -> None:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            BaseFolder(folder).get(NAME)

        def plain() -> None:
            with path.open("rb") as file:
                file.read(size)

        runs = {
            "read the header's bytes": plain,
            "open it the first time": lambda: BaseFolder(folder).get(NAME),
            "the same, not in the page cache": cold,
            "open it again": lambda: known.get(NAME),
        }
        times = in_turns(runs, seconds=8)
        report(
            f"A GGUF file of {path.stat().st_size / 1e9:.1f} GB, {len(base.tensor_names)} tensors, "
            f"whose header has {size / 1e6:.1f} MB",
            [{"what": what, "ms": seconds * 1e3} for what, seconds in times.items()],
        )


if __name__ == "__main__":
    main()
