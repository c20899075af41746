"""Files that other programs cut under a running service."""

import os

import httpx
import numpy as np
import pytest
from conftest import peft_config, peft_tensors, upload_parts
from test_command import running

from bonsai_lora.formats import safetensors

ROWS, WIDTH = 12_000, 1000
"""A tensor of 48 MB, more than the sockets hold."""


def test_a_base_that_is_cut_ends_the_download_and_not_the_service(tmp_path, rng):
    folder = tmp_path / "bases" / "b"
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.encode({"q_proj.weight": np.ones((ROWS, WIDTH), np.float32)}))
    whole = path.stat().st_size
    flags = ("--store", str(tmp_path / "store"), "--bases", str(folder.parent))
    with running(*flags) as (url, process), httpx.Client(base_url=url, timeout=30) as client:
        tensors = peft_tensors(rng, "q_proj", d_in=WIDTH, d_out=ROWS)
        assert upload_parts(client, "s", peft_config(), tensors).status_code == 201
        merged = f"/v1/bases/b/merged/s/{path.name}"
        with client.stream("GET", merged) as answer:
            assert answer.status_code == 200
            parts = answer.iter_raw()
            next(parts)
            os.truncate(path, 2_000_000)
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in parts:
                    pass
        assert client.get("/healthz").status_code == 200
        listed = client.get(merged)
        assert (listed.status_code, listed.json()["code"]) == (422, "invalid_base")
        os.truncate(path, whole)
        assert client.get(merged, headers={"Range": "bytes=0-99"}).status_code == 206
        assert process.poll() is None
