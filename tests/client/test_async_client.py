"""AsyncClient makes the same calls; what it does itself is sending, paging and streaming."""

import asyncio
import contextlib
import tempfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import TINY
from scripted import DROP, Answer, scripted

from bonsai_lora import AsyncClient, Client, errors

STATS = Answer(200, b'{"set_count": 1}')
BUSY = Answer(503, b'{"code": "busy", "detail": "text"}', ("Retry-After: 0",))
SIDE = 1024


def run(url, use, **options):
    async def main():
        async with AsyncClient(url, **options) as client:
            return await use(client)

    return asyncio.run(main())


def test_calls(service, rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)

    async def use(client):
        await client.create_set("s", config={"rank": 2})
        await client.put_weights("s", "m", rng.standard_normal((2, 4)), np.ones((3, 2)))
        await client.upload_set("plain", TINY / "plain")
        names = [one["name"] async for one in client.list_sets(page_size=1)]
        with pytest.raises(errors.SetNotFoundError):
            await client.get_set("nobody")
        assert (await client.get_set("s", version=2))["version"] == 2
        with pytest.raises(errors.VersionNotFoundError):
            await client.apply("s", "m", x, version=1)
        with pytest.raises(errors.VersionNotFoundError):
            await anext(client.merge_stream("s", "m", [x.tobytes()], dtype="F32", version=1))
        rows = await asyncio.gather(*(client.apply("s", "m", row) for row in x))
        return names, np.stack([one.outputs for one in rows])

    names, outputs = run(service, use)
    assert names == ["plain", "s"]
    with Client(service) as client:
        assert np.array_equal(outputs, client.apply("s", "m", x).outputs)


def test_streams(service, rng, tmp_path):
    w = rng.standard_normal((SIDE, SIDE)).astype(np.float32)
    name = "model-00001-of-00003.safetensors"
    (tmp_path / "w").write_bytes(w.tobytes())

    async def asynchronous():
        for row in w:
            yield row.tobytes()

    async def use(client):
        await client.create_set("s", config={"rank": 1})
        await client.put_weights("s", "m", np.ones((1, SIDE)), np.ones((SIDE, 1)))
        await client.upload_set("plain", TINY / "plain")
        found = [(await client.merge("s", "m", w)).tobytes()]
        with (tmp_path / "w").open("rb") as file:
            for source in (asynchronous(), (row.tobytes() for row in w), file):
                blocks = client.merge_stream("s", "m", source, dtype="F32")
                found.append(b"".join([block async for block in blocks]))
        parts = client.stream_merged_file("tiny-qwen3", "plain", name, start=9)
        return found, b"".join([part async for part in parts])

    found, rest = run(service, use)
    with Client(service) as client:
        assert set(found) == {client.merge("s", "m", w).tobytes()}
        assert rest == client.get_merged_file("tiny-qwen3", "plain", name)[9:]


def test_retries():
    async def read(client):
        return await client.get_stats()

    async def write(client):
        return await client.create_set("s")

    with scripted([DROP, BUSY, STATS]) as server:
        assert run(server.url, read) == {"set_count": 1}
        assert len(server.heads) == 3
    with scripted([BUSY, STATS]) as server:
        assert run(server.url, write)["set_count"] == 1
    with scripted([DROP, STATS]) as server:
        with pytest.raises(httpx.TransportError):
            run(server.url, write)
        assert len(server.heads) == 1


def test_a_merge_of_a_matrix_is_repeated_from_its_start():
    w = np.ones((SIDE, SIDE), np.float32)

    async def use(client):
        with contextlib.suppress(errors.BusyError):
            await client.merge("s", "m", w)

    with scripted([BUSY, BUSY, BUSY]) as server:
        run(server.url, use)
    assert len(set(server.bodies)) == 1
    assert len(server.bodies) == 3
    assert len(server.bodies[0]) > w.nbytes


def test_token_headers_and_a_unix_socket(settings):
    from test_uds import over, serve

    async def use(client):
        return await client.get_stats()

    with scripted([STATS]) as server:
        run(server.url, use, token="t", headers={"X-Team": "a"})
    assert b"authorization: bearer t" in server.heads[0].lower()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        with serve(path, Path(folder) / "store"), over(path):
            assert run(None, use, uds=path)["set_count"] == 0
