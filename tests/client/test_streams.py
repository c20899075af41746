"""Weights and files that are larger than what a client holds, and downloads that go on."""

import io
import json
import subprocess
import sys

import httpx
import numpy as np
import pytest
from conftest import TINY
from scripted import Answer, scripted

from bonsai_lora import Client, errors
from bonsai_lora.client.download import STATE_FOLDER

SIDE = 4096
"""Of a matrix of 64 MiB."""


@pytest.fixture
def client(service, rng):
    with Client(service) as client:
        client.create_set("s", config={"rank": 1, "alpha": 1.0})
        client.put_weights("s", "m", np.ones((1, SIDE)), np.arange(SIDE).reshape(-1, 1))
        yield client


MERGE = """
import resource, sys
import numpy as np
from bonsai_lora import Client

ROW = np.full({side}, 0.5, np.float32).tobytes()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with Client({url!r}) as client:
    client.get_set("s")
    before, rest, total = peak(), b"", 0
    for block in client.merge_stream("s", "m", (ROW for _ in range({side})), dtype="F32"):
        numbers = np.frombuffer(block, np.float32)
        rows = (total // 4 + np.arange(len(numbers))) // {side}
        assert len(block) <= 1 << 20
        assert np.array_equal(numbers, rows.astype(np.float32) + np.float32(0.5))
        total += len(block)
    print(total, peak() - before)
"""


def test_a_merge_of_64_mib_takes_a_few_blocks_of_memory(client, service):
    code = MERGE.format(side=SIDE, url=service)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    total, grown = map(int, done.stdout.split())
    assert total == 4 * SIDE * SIDE
    assert grown < 16 << 20


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_stream_gives_what_a_matrix_gives(client, rng, dtype, tmp_path):
    from bonsai_lora.formats.dtypes import FLOAT_DTYPES

    w = rng.standard_normal((SIDE, SIDE), np.float32).astype(FLOAT_DTYPES[dtype])
    whole = client.merge("s", "m", w).tobytes()
    assert b"".join(client.merge_stream("s", "m", io.BytesIO(w.tobytes()), dtype=dtype)) == whole
    (tmp_path / "w").write_bytes(w.tobytes())
    with (tmp_path / "w").open("rb") as file:
        undone = client.merge_stream("s", "m", file, dtype=dtype, unmerge=True)
        assert b"".join(undone) == client.merge("s", "m", w, unmerge=True).tobytes()


def test_a_stream_of_the_wrong_length(client):
    with pytest.raises(errors.MalformedBodyError):
        list(client.merge_stream("s", "m", [bytes(100)], dtype="F32"))
    with pytest.raises(errors.SetNotFoundError):
        list(client.merge_stream("nobody", "m", [bytes(1 << 22)] * 16, dtype="F32"))


def test_what_the_source_of_a_stream_raises_is_raised(client):
    def blocks():
        yield bytes(100)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(client.merge_stream("s", "m", blocks(), dtype="F32"))
    assert client.get_set("s")["version"] == 2


def tree(files):
    return json.dumps([{"type": "file", **one} for one in files]).encode()


def test_a_download_goes_on_where_the_connection_broke(tmp_path):
    content = bytes(range(256)) * 40
    tag = 'ETag: "t1"'
    steps = [
        Answer(200, b'{"sha": "c1"}'),
        Answer(200, tree([{"path": "a/f.bin", "size": len(content), "oid": "t1"}])),
        Answer(200, content, (tag,), sent=3000),
        Answer(206, content[3000:], (tag,), sent=4000),
        Answer(206, content[7000:], (tag,)),
        Answer(206, content[-1:], (tag, "Bonsai-Delta-Gain: 0.25")),
    ]
    seen = []
    with scripted(steps) as server, Client(server.url) as client:
        pulled = client.pull(
            "b/s", tmp_path, on_progress=lambda done, total: seen.append((done, total))
        )
    assert (tmp_path / "a" / "f.bin").read_bytes() == content
    assert pulled["commit"] == "c1"
    assert pulled["delta_gain"] == 0.25
    assert b"Range: bytes=3000-" in server.heads[3]
    assert b'If-Range: "t1"' in server.heads[3]
    assert b"Range: bytes=7000-" in server.heads[4]
    assert seen[-1] == (len(content), len(content))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_download_that_breaks_too_often_keeps_what_it_has(tmp_path):
    steps = [
        Answer(200, b'{"sha": "c1"}'),
        Answer(200, tree([{"path": "f", "size": 1000, "oid": "t1"}])),
        Answer(200, b"x" * 1000, ('ETag: "t1"',), sent=300),
    ]
    with (
        scripted(steps) as server,
        Client(server.url, retries=0) as client,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        client.pull("b/s", tmp_path)
    assert (tmp_path / STATE_FOLDER / "f.t1.partial").read_bytes() == b"x" * 300
    assert not (tmp_path / "f").exists()


def test_a_download_starts_again_if_the_service_sends_all(tmp_path):
    content = b"x" * 1000
    (tmp_path / STATE_FOLDER).mkdir()
    (tmp_path / STATE_FOLDER / "f.t1.partial").write_bytes(b"y" * 100)
    steps = [
        Answer(200, b'{"sha": "c1"}'),
        Answer(200, tree([{"path": "f", "size": 1000, "oid": "t1"}])),
        Answer(200, content, ('ETag: "t1"',)),
        Answer(503, b"{}"),  # the files are there, whatever becomes of the question about the gain
    ]
    with scripted(steps) as server, Client(server.url, retries=0) as client:
        assert client.pull("b/s", tmp_path)["delta_gain"] is None
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Answer(200, b"x" * 1000, ('ETag: "t2"',)), "changed during the download"),
        (Answer(200, b"x" * 999, ('ETag: "t1"',)), "has 999 bytes instead of 1000"),
    ],
)
def test_a_file_that_is_not_what_was_announced(tmp_path, answer, text):
    steps = [
        Answer(200, b'{"sha": "c1"}'),
        Answer(200, tree([{"path": "f", "size": 1000, "oid": "t1"}])),
        answer,
    ]
    with (
        scripted(steps) as server,
        Client(server.url) as client,
        pytest.raises(ValueError, match=text),
    ):
        client.pull("b/s", tmp_path)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("path", ["../f", "/etc/f", "a/../../f", "", ".bonsai-pull/f"])
def test_a_path_that_leads_out_of_the_folder(tmp_path, path):
    steps = [
        Answer(200, b'{"sha": "c1"}'),
        Answer(200, tree([{"path": path, "size": 1, "oid": "t1"}])),
    ]
    with (
        scripted(steps) as server,
        Client(server.url) as client,
        pytest.raises(ValueError, match="no folder can hold"),
    ):
        client.pull("b/s", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_refused_ends_the_download(tmp_path):
    files = [{"path": name, "size": 10, "oid": "t"} for name in ("a", "b")]
    steps = [
        Answer(200, b'{"sha": "c1"}'),
        Answer(200, tree(files)),
        Answer(404, b'{"code": "not_found", "detail": "gone"}'),
        Answer(200, b"x" * 10, ('ETag: "t"',)),
    ]
    with (
        scripted(steps) as server,
        Client(server.url) as client,
        pytest.raises(errors.NotFoundError, match="gone"),
    ):
        client.pull("b/s", tmp_path, parallel=1)
    assert not (tmp_path / "a").exists()


def test_a_pull_of_what_does_not_exist(service, tmp_path):
    with Client(service) as client:
        with pytest.raises(errors.NotFoundError, match="no set named 'nobody'"):
            client.pull("adapters/nobody", tmp_path / "x")
        client.upload_set("plain", TINY / "plain")
        with pytest.raises(errors.NotFoundError):
            client.pull("nothing/plain", tmp_path / "x")
    with Client(service) as client, pytest.raises(errors.InvalidNameError):
        client.pull("../..", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_answer_that_is_not_read_to_its_end_leaves_the_client_usable(client):
    blocks = client.merge_stream("s", "m", [bytes(4 * SIDE * SIDE)], dtype="F32")
    next(blocks)
    blocks.close()
    assert client.get_set("s")["name"] == "s"
