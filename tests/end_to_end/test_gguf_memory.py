"""A merged GGUF file is computed in constant memory, however large it is."""

import gguf_files
import gguf_models
import httpx
import numpy as np
from conftest import peft_config, peft_tensors, upload_parts
from test_command import running, workers_of
from test_memory import private_bytes

WIDTH, ROWS = 4096, 32_768
MODULE = "model.layers.0.mlp.up_proj"
MERGED = 2 * WIDTH * ROWS  # 268 MB


def write_base(path, rng):
    blocks = gguf_files.random_blocks("Q1_0", 4096, rng)
    raw = blocks * (WIDTH * ROWS // 128 // 4096)
    tensors = {"blk.0.ffn_up.weight": ("Q1_0", (ROWS, WIDTH), raw)}
    path.write_bytes(gguf_files.file_of(gguf_models.keys_of("qwen3"), tensors))


def test_memory_is_constant(tmp_path, rng):
    (tmp_path / "bases").mkdir()
    write_base(tmp_path / "bases" / "b.gguf", rng)
    options = ("--store", str(tmp_path / "store"), "--bases", str(tmp_path / "bases"))
    with running(*options) as (url, process), httpx.Client(base_url=url, timeout=60) as client:
        config = peft_config(target_modules=["up_proj"])
        tensors = peft_tensors(rng, MODULE, d_in=WIDTH, d_out=ROWS)
        assert upload_parts(client, "s", config, tensors).status_code == 201
        (worker,) = workers_of(process)
        for name in ("b.gguf?dtype=F16", "b.gguf?dtype=Q8_0", "model.safetensors"):
            path = f"/v1/bases/b/merged/s/{name}"
            client.get(path, headers={"Range": "bytes=0-9999999"})
            before = private_bytes(worker)
            done, peak = 0, 0
            with client.stream("GET", path) as answer:
                for block in answer.iter_raw(1 << 22):
                    done += len(block)
                    peak = max(peak, private_bytes(worker) - before)
            assert done == int(answer.headers["content-length"]) > MERGED / 2
            assert peak < 64e6, name


def test_a_long_row_takes_no_more_memory(tmp_path, rng):
    """The row is 4 GB as float32, of a file that is mostly a hole."""
    folder = tmp_path / "bases" / "b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    kind, width = gguf_files.BY_NAME["Q1_0"], 1 << 30
    layout = {"blk.0.ffn_up.weight": (kind, (1, width))}
    plan = gguf_files.gguf_writer.plan(gguf_models.keys_of("qwen3"), layout)
    with (folder / "b.gguf").open("wb") as out:
        out.write(plan.head)
        out.truncate(plan.total_bytes)
    options = ("--store", str(tmp_path / "store"), "--bases", str(tmp_path / "bases"))
    with running(*options) as (url, process), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/v1/bases/b").status_code == 200
        (worker,) = workers_of(process)
        name = "/bases/b/resolve/main/model.safetensors"
        before = private_bytes(worker)
        got = client.get(name, headers={"Range": f"bytes={width}-{width + 9_999_999}"})
        assert got.status_code == 206
        values = np.frombuffer(got.content, np.uint16)
        assert set(values) == {0x8000}, "minus zero: the scale is 0, and the sign bit of a hole"
        assert private_bytes(worker) - before < 64e6
