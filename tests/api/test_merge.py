import contextlib
import gc
import http.client
import os
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import TINY, assert_problem, read_tensors, serving, upload

from bonsai_lora.api import spool
from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors

BINARY = "application/vnd.safetensors"
RAW = "application/octet-stream"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BASE = {
    name: tensor
    for path in sorted((TINY / "base").glob("*.safetensors"))
    for name, tensor in read_tensors(path).items()
}


@pytest.mark.parametrize("adapter", ["plain", "attention-only", "rslora-patterns"])
def test_every_module_equals_what_peft_merged(client, adapter):
    upload(client, adapter, TINY / adapter)
    golden = read_tensors(TINY / adapter / "merged_f32.safetensors")
    for module in client.get(f"/v1/sets/{adapter}").json()["modules"]:
        weight = BASE[f"{module['name']}.weight"].astype(np.float32)
        path = f"/v1/sets/{adapter}/adapters/{module['name']}/merge"
        raw = client.post(
            f"{path}?dtype=F32", content=weight.tobytes(), headers={"Content-Type": RAW}
        )
        assert raw.headers["content-length"] == str(weight.nbytes)
        got = np.frombuffer(raw.content, np.float32).reshape(weight.shape)
        expected = golden[f"{module['name']}.weight"]
        assert np.abs(got - expected).max() <= 4 * 2.0**-24 * np.abs(expected).max()
        as_json = client.post(path, json={"weights": weight.tolist()}).json()
        assert as_json["version"] == 1
        assert np.array_equal(np.array(as_json["weights"], np.float32), got)


@pytest.fixture
def wide(client, rng):
    """A set with one module of 96 x 20,000, whose merge has several blocks."""
    client.post("/v1/sets", json={"name": "s"})
    tensors = {
        "lora_A": rng.standard_normal((3, 20_000)).astype(np.float32),
        "lora_B": rng.standard_normal((96, 3)).astype(np.float32),
    }
    client.put(
        "/v1/sets/s/adapters/m?alpha=6",
        content=safetensors.encode(tensors),
        headers={"Content-Type": BINARY},
    )
    return client, tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unmerge", [False, True])
def test_all_dtypes_are_the_sum_rounded_once(wide, rng, dtype, unmerge):
    client, tensors = wide
    weight = rng.standard_normal((96, 20_000)).astype(DTYPES[dtype])
    sign = -1 if unmerge else 1
    exact = reference.merge(weight, tensors["lora_A"], tensors["lora_B"], sign * 2.0)
    params = {"dtype": dtype, "unmerge": unmerge}
    answer = client.post(
        "/v1/sets/s/adapters/m/merge",
        params=params,
        content=weight.tobytes(),
        headers={"Content-Type": RAW},
    )
    got = np.frombuffer(answer.content, DTYPES[dtype]).reshape(weight.shape).astype(np.float64)
    half_ulp = np.abs(exact) * float(ml_dtypes.finfo(DTYPES[dtype]).eps) / 2
    assert (np.abs(got - exact) <= half_ulp + 1e-4).all()
    body = safetensors.encode({"weights": weight}, {"kept": "as it is"})
    again = client.post(
        f"/v1/sets/s/adapters/m/merge?unmerge={unmerge}",
        content=body,
        headers={"Content-Type": BINARY},
    )
    assert again.headers["content-type"] == BINARY
    assert again.content[: -weight.nbytes] == body[: -weight.nbytes]
    assert again.content[-weight.nbytes :] == answer.content


def test_errors_come_before_the_first_byte(wide):
    client, _ = wide
    path = "/v1/sets/s/adapters/m/merge"
    size = 96 * 20_000 * 4
    zeros = np.zeros((96, 20_000), np.float32)

    def raw(content, query="?dtype=F32", media=RAW, **headers):
        return client.post(
            path + query, content=content, headers={"Content-Type": media, **headers}
        )

    assert_problem(raw(b"", ""), 422, "invalid_request")
    assert_problem(raw(b"", "?dtype=F64"), 422, "invalid_request")
    body = assert_problem(raw(bytes(size - 4)), 422, "shape_mismatch")
    assert (body["got_bytes"], body["expected_bytes"]) == (size - 4, size)
    assert_problem(raw(bytes(size + 4)), 422, "shape_mismatch")
    assert_problem(raw(iter([b"x" * 100])), 400, "malformed_body")
    assert_problem(raw(bytes(size), Accept="application/json"), 406, "not_acceptable")
    for tensors, code in [
        ({"other": zeros}, "invalid_request"),
        ({"weights": zeros.T}, "shape_mismatch"),
        ({"weights": zeros.astype(np.float64)}, "invalid_request"),
        ({"weights": zeros, "more": zeros}, "invalid_request"),
    ]:
        assert_problem(raw(safetensors.encode(tensors), "", BINARY), 422, code)
    wrong = raw(safetensors.encode({"weights": zeros}), "?dtype=F16", BINARY)
    assert_problem(wrong, 422, "invalid_request")
    assert_problem(client.post(path, json={"weights": [[1.0]]}), 422, "shape_mismatch")
    assert_problem(client.post(path, json={"weight": [[1.0]]}), 422, "invalid_request")


def test_a_short_body_aborts_the_stream(wide):
    client, _ = wide
    chunks = iter([bytes(1 << 20)] * 3)
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(
            "/v1/sets/s/adapters/m/merge?dtype=F32", content=chunks, headers={"Content-Type": RAW}
        )
    assert client.get("/healthz").status_code == 200


def connect(client):
    url = urlsplit(str(client.base_url))
    return http.client.HTTPConnection(url.hostname, url.port, timeout=60)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_a_client_that_sends_everything_first(settings, rng):
    """48 MB exceed the buffers of sockets and memory: they are buffered on disk, unchanged."""
    d_out, d_in = 3000, 4000
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
        client.put("/v1/sets/s/adapters/m", json={"d_in": d_in, "d_out": d_out})
        weight = rng.standard_normal((d_out, d_in)).astype(np.float32)
        assert weight.nbytes > 8 * spool.MEMORY_BYTES
        for _ in range(3):
            with contextlib.closing(connect(client)) as connection:
                connection.request(
                    "POST",
                    "/v1/sets/s/adapters/m/merge?dtype=F32",
                    weight.tobytes(),
                    {"Content-Type": RAW},
                )
                answer = connection.getresponse().read()
            assert len(answer) == weight.nbytes
            assert answer == weight.tobytes(), "B is zero, so W comes back"


def test_a_client_that_stops_reading_is_disconnected(settings):
    tight = settings.model_copy(update={"max_spill_bytes": 1 << 20, "stall_seconds": 0.3})
    app = create_app(tight)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
        client.put("/v1/sets/s/adapters/m", json={"d_in": 4000, "d_out": 3000})
        connection = connect(client)
        connection.putrequest("POST", "/v1/sets/s/adapters/m/merge?dtype=F32")
        connection.putheader("Content-Type", RAW)
        connection.putheader("Content-Length", str(4 * 4000 * 3000))
        connection.endheaders()
        connection.sock.settimeout(1)
        with pytest.raises(OSError):
            for _ in range(48):
                connection.send(bytes(1_000_000))
        deadline = time.monotonic() + 10
        while app.state.context.long.in_progress:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        connection.close()
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("sent", [0, 100, 3 << 20])
def test_a_client_that_disconnects_leaves_nothing_behind(wide, app, sent):
    client, _ = wide
    client.get("/healthz")
    gc.collect()
    files, threads = open_files(), threading.active_count()
    for _ in range(5):
        url = urlsplit(str(client.base_url))
        with contextlib.closing(socket.create_connection((url.hostname, url.port))) as plain:
            head = (
                f"POST /v1/sets/s/adapters/m/merge?dtype=F32 HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: {RAW}\r\nContent-Length: {96 * 20_000 * 4}\r\n\r\n"
            )
            plain.sendall(head.encode() + bytes(sent))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        gc.collect()
        if open_files() <= files and app.state.context.long.in_progress == 0:
            break
        time.sleep(0.05)
    assert open_files() <= files
    assert app.state.context.long.in_progress == 0
    assert threading.active_count() <= threads + 4  # anyio keeps idle workers


def test_reading_while_sending_needs_no_disk(wide, rng, monkeypatch):
    client, tensors = wide
    monkeypatch.setattr(spool.Spool, "_write", None)
    weight = rng.standard_normal((96, 20_000)).astype(np.float32)
    got = bytearray()
    with client.stream(
        "POST",
        "/v1/sets/s/adapters/m/merge?dtype=F32",
        content=weight.tobytes(),
        headers={"Content-Type": RAW},
    ) as answer:
        for block in answer.iter_raw():
            got += block
    exact = reference.merge(weight, tensors["lora_A"], tensors["lora_B"], 2.0)
    assert np.allclose(np.frombuffer(got, np.float32).reshape(weight.shape), exact, atol=1e-4)
