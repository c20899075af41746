"""A set in use is the pages of its file; they go with it, once requests in flight are done."""

import re
import threading
import time
from pathlib import Path

import httpx
import ml_dtypes
import numpy as np
from conftest import peft_config, peft_tensors, upload_parts
from test_command import running, workers_of

from bonsai_lora.formats import safetensors

MODULE = "model.layers.0.self_attn.q_proj"
WIDTH = 4_000_000
SIZE = 2 * 4 * WIDTH
COPIES = 2 * SIZE  # the size of A as float32; the allocator keeps some MiB of bodies


def private_bytes(pid):
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(kb) * 1024 for kb in re.findall(r"^Private_Dirty: +(\d+) kB", text, re.MULTILINE)
    )


def taken_since(before, pid):
    """What a process holds more, once it is at rest: a body may outlive its answer a little."""
    return min(private_bytes(pid) - before for _ in range(10) if not time.sleep(0.05))


def test_memory_is_released(tmp_path, rng):
    tensors = {
        key: value.astype(ml_dtypes.bfloat16)
        for key, value in peft_tensors(rng, rank=4, d_in=WIDTH, d_out=8).items()
    }
    body = safetensors.encode({"inputs": np.ones((1, WIDTH), np.float32)})
    path = f"/v1/sets/s/adapters/{MODULE}/apply"
    headers = {"Content-Type": "application/vnd.safetensors"}
    with running("--store", str(tmp_path)) as (url, process):
        client = httpx.Client(base_url=url, timeout=30)
        upload_parts(client, "s", peft_config(), tensors)
        upload_parts(client, "other", peft_config(), tensors)
        assert client.post(path.replace("/s/", "/other/"), content=body, headers=headers).is_success
        assert httpx.delete(f"{url}/v1/sets/other").status_code == 204
        (worker,) = workers_of(process)
        before = private_bytes(worker)
        assert client.post(path, content=body, headers=headers).status_code == 200
        assert taken_since(before, worker) < 0.5 * COPIES, "nothing is copied"
        assert client.get("/v1/stats").json()["resident_bytes"] > 0.9 * SIZE

        deleted = threading.Event()

        def slowly():
            yield body[: len(body) // 2]
            deleted.wait(20)
            yield body[len(body) // 2 :]

        answers = []
        in_flight = threading.Thread(
            target=lambda: answers.append(client.post(path, content=slowly(), headers=headers))
        )
        in_flight.start()
        time.sleep(0.3)
        assert httpx.delete(f"{url}/v1/sets/s").status_code == 204
        assert httpx.post(f"{url}{path}", content=body, headers=headers).status_code == 404
        deleted.set()
        in_flight.join()
        assert answers[0].status_code == 200, "it finishes on the set it started with"
        assert client.get("/v1/stats").json()["resident_bytes"] == 0
        assert taken_since(before, worker) < 0.5 * COPIES
        client.close()
