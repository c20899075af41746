"""How a client finds the service, and what it sends with every request."""

import tempfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import TINY
from scripted import Answer, scripted

import bonsai_lora
from bonsai_lora import AsyncClient, Client, errors

STATS = Answer(200, b'{"set_count": 1}')


@pytest.fixture(autouse=True)
def free(monkeypatch):
    monkeypatch.delenv("BONSAI_LORA_URL", raising=False)
    monkeypatch.delenv("BONSAI_LORA_TOKEN", raising=False)


def heads(steps=1, url=None, **options):
    with scripted([STATS] * steps) as server, Client(url or server.url, **options) as client:
        for _ in range(steps):
            client.get_stats()
    return [head.decode().lower().split("\r\n") for head in server.heads]


def test_token_and_headers_are_sent_with_every_request():
    for head in heads(2, token="bl_1", headers={"X-Team": "a"}):
        assert "authorization: bearer bl_1" in head
        assert "x-team: a" in head


def test_the_token_of_the_environment(monkeypatch):
    assert not [line for line in heads()[0] if line.startswith("authorization")]
    monkeypatch.setenv("BONSAI_LORA_TOKEN", "bl_2")
    assert "authorization: bearer bl_2" in heads()[0]
    assert "authorization: bearer bl_3" in heads(token="bl_3")[0]
    assert not [line for line in heads(token="")[0] if line.startswith("authorization")]
    assert "authorization: basic x" in heads(headers={"Authorization": "Basic x"})[0]


def test_the_url_of_the_environment(service, monkeypatch):
    monkeypatch.setenv("BONSAI_LORA_URL", service)
    with Client() as client:
        assert client.get_stats()["set_count"] == 0
    with Client("http://127.0.0.1:9", retries=0) as client, pytest.raises(httpx.ConnectError):
        client.get_stats()


def test_a_url_with_a_path():
    with scripted([STATS]) as server, Client(f"{server.url}/lora") as client:
        client.get_stats()
    assert server.heads[0].startswith(b"GET /lora/v1/stats HTTP/1.1\r\n")


def test_one_address():
    with pytest.raises(ValueError, match="both given"):
        Client("http://localhost", uds="/tmp/x")


def test_a_unix_socket(settings, rng):
    from test_uds import over, serve

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        with serve(path, Path(folder) / "store"), over(path), Client(uds=path) as client:
            client.upload_set("plain", TINY / "plain")
            module = client.list_adapters("plain")[0]
            x = rng.standard_normal((3, module["d_in"])).astype(np.float32)
            applied = client.apply("plain", module["name"], x)
            assert applied.outputs.shape == (3, module["d_out"])
            assert [one["name"] for one in client.list_sets()] == ["plain"]


def test_threads_share_a_client(service, rng):
    from concurrent.futures import ThreadPoolExecutor

    with Client(service) as client:
        client.create_set("s", config={"rank": 2})
        client.put_weights("s", "m", rng.standard_normal((2, 8)), rng.standard_normal((8, 2)))
        x = rng.standard_normal((16, 8)).astype(np.float32)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda row: client.apply("s", "m", row).outputs, x))
        assert np.array_equal(np.stack(found), client.apply("s", "m", x).outputs)


def test_the_package_gives_the_clients_their_names():
    assert bonsai_lora.Client is Client
    assert {"Client", "AsyncClient"} <= set(bonsai_lora.__all__) <= set(dir(bonsai_lora))


def test_what_is_not_a_url():
    for url in ("localhost:8000", "ftp://localhost"):
        with pytest.raises(ValueError, match=f"'{url}' is not a valid URL; expected one such as"):
            Client(url)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_secrets_are_not_in_errors(monkeypatch, kind):
    for token in ("hidden\n", "hid den", "\N{RIGHT SINGLE QUOTATION MARK}hidden", "hidden\r\nX: y"):
        with pytest.raises(ValueError, match=r"the token .* has a space, a line end") as refused:
            kind("http://127.0.0.1:9", token=token)
        monkeypatch.setenv("BONSAI_LORA_TOKEN", token)
        with pytest.raises(ValueError, match="BONSAI_LORA_TOKEN") as as_variable:
            kind("http://127.0.0.1:9")
        assert "hid" not in f"{refused.value} {as_variable.value}"
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"'ftp:...@localhost' is not a valid URL"):
        kind("ftp://key:hidden@localhost")


def test_sets_of_the_wrong_kind_are_refused_before_anything_is_sent():
    with Client("http://127.0.0.1:9") as client:
        for call in (
            lambda: client.combine("n", ["a", "b"]),
            lambda: client.apply("a", "q_proj", np.ones(2), sets=["b"]),
        ):
            with pytest.raises(errors.InvalidRequestError, match="sets is a list; expected a map"):
                call()
        for call in (client.compare, client.start_compare):
            with pytest.raises(errors.InvalidRequestError, match="sets is the text 'demo'"):
                call("demo")
        for rows in ("demo", {"demo": 1.0}):
            with pytest.raises(errors.InvalidRequestError, match="a list with an entry per row"):
                client.apply_mixed("q_proj", rows, np.ones((4, 2)))
        for inputs in (np.ones(2), ["q_proj"]):
            with pytest.raises(errors.InvalidRequestError, match="inputs is a batch without mod"):
                client.apply_many("demo", inputs)
        for call in (
            lambda: client.get_spectrum("demo", modules="q_proj"),
            lambda: client.start_extract("n", "a", "b", rank=2, modules="q_proj"),
            lambda: client.apply_many("demo", np.ones(2), modules="q_proj"),
        ):
            with pytest.raises(errors.InvalidRequestError, match="modules is the text 'q_proj'"):
                call()
        for weights in ("w.bin", Path("w.bin")):
            with pytest.raises(errors.InvalidRequestError, match="expected a file opened in"):
                list(client.merge_stream("demo", "q_proj", weights, dtype="F32"))
