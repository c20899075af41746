"""Files that other programs cut under a running service."""

import os
import signal
import time

import httpx
import numpy as np
import pytest
from conftest import peft_config, peft_tensors, upload_parts
from test_command import running, workers_of

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


@pytest.mark.parametrize("is_restored", [False, True])
def test_a_set_that_is_cut_costs_one_worker_and_is_not_served(tmp_path, rng, is_restored):
    """Its pages are mapped: the worker that touches them dies, and the next one checks the set."""
    flags = ("--store", str(tmp_path))
    with running(*flags) as (url, process), httpx.Client(base_url=url, timeout=30) as client:
        tensors = peft_tensors(rng, "q_proj", d_in=WIDTH, d_out=3_000_000)
        assert upload_parts(client, "s", peft_config(), tensors).status_code == 201
        small = peft_tensors(rng, "q_proj")
        assert upload_parts(client, "other", peft_config(), small).status_code == 201
        path = tmp_path / "sets" / "s.safetensors"
        before, whole = workers_of(process), path.stat().st_size
        with client.stream("GET", "/adapters/s/resolve/main/adapter_model.safetensors") as answer:
            parts = answer.iter_raw()
            next(parts)
            os.truncate(path, 4096)
            with pytest.raises(httpx.TransportError):
                for _ in parts:
                    pass
        died = time.monotonic()
        if is_restored:  # with zeros for what was cut
            os.truncate(path, whole)
        with httpx.Client(base_url=url, timeout=30) as again:
            assert again.get("/v1/sets/other").status_code == 200
            assert time.monotonic() - died < 2
            assert workers_of(process) != before
            assert again.get("/v1/sets/s/stats").json()["code"] == "set_not_found"
            reason = again.get("/readyz").json()["bad_files"]["s"]
            assert ("is damaged" if is_restored else "truncated") in reason
            assert again.get("/v1/sets/other/stats").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
