"""HTTPS, and a path prefix that a proxy removes."""

import contextlib
import socket
import ssl
import time

import httpx
import pytest
from conftest import DATA, TINY, serving, upload
from test_command import running

from bonsai_lora.api.app import create_app
from bonsai_lora.cli.main import main
from bonsai_lora.settings import Settings

CERTIFICATE, KEY = DATA / "tls" / "cert.pem", DATA / "tls" / "key.pem"


@pytest.mark.parametrize("lane", ["auto", "off"])
def test_https(tmp_path, lane):
    flags = ["--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY), "--fast-lane", lane]
    with running("--store", str(tmp_path), *flags) as (address, _):
        assert address.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
        with httpx.Client(base_url=address, verify=trusted) as client:
            assert upload(client, "plain", TINY / "plain").status_code == 201
            for rows in (1, 2000):  # the second is long: 1.2 MB of JSON there, 2.5 MB back
                body = {"inputs": [[0.5] * 64] * rows}
                path = "/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj/apply"
                answer = client.post(path, json=body)
                assert len(answer.json()["outputs"]) == rows
            own = {"Origin": address}
            assert client.delete("/v1/sets/plain", headers=own).status_code == 204
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)


TLS = ["--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY)]
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
"""The beginning of a ClientHello of 512 bytes."""


@pytest.mark.parametrize("sent", [b"", HELLO], ids=["nothing", "a part"])
def test_a_stalled_handshake_ends_with_the_stall_timeout(tmp_path, sent):
    flags = ["--store", str(tmp_path), *TLS, "--stall-seconds", "1"]
    with running(*flags) as (address, _), connection_to(address) as connection:
        began = time.monotonic()
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1000):  # an alert
                pass
        assert 0.9 < time.monotonic() - began < 5
        trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
        assert httpx.get(f"{address}/healthz", verify=trusted).status_code == 200


def test_a_stalled_handshake_does_not_delay_the_end(tmp_path):
    flags = ["--store", str(tmp_path), *TLS, "--stall-seconds", "60"]
    with running(*flags) as (address, process), connection_to(address) as connection:
        connection.sendall(HELLO)
        time.sleep(0.2)
        process.terminate()
        assert process.wait(10) == 0


def connection_to(address):
    host, _, port = address.partition("://")[2].partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tls-cert", CERTIFICATE], "give both or neither"),
        (["--tls-key", KEY], "give both or neither"),
        (["--tls-cert", CERTIFICATE, "--tls-key", "absent.pem"], "directory; check --tls-key"),
        (["--tls-cert", "absent.pem", "--tls-key", KEY], "directory; check --tls-cert"),
        (["--tls-cert", KEY, "--tls-key", KEY], "cannot be used"),
        (["--tls-cert", CERTIFICATE, "--tls-key", KEY, "--uds", "x.sock"], "is for a port"),
    ],
)
def test_serve_does_not_start_with_half_of_tls(capfd, tmp_path, flags, reason):
    words = ["serve", "--store", str(tmp_path / "store"), "--port", "0", *map(str, flags)]
    assert main(words) == 2
    assert reason in capfd.readouterr().err


def test_a_path_prefix_is_in_what_leads_back(settings):
    app = create_app(settings.model_copy(update={"root_path": "/lora"}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        created = client.post("/v1/sets", json={"name": "s"})
        assert created.headers["Location"] == "/lora/v1/sets/s"
        uploaded = upload(client, "plain", TINY / "plain")
        assert uploaded.headers["Location"] == "/lora/v1/sets/plain"
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/lora"}]
        for page in (client.get("/").text, client.get("/docs").text):
            assert page.startswith("<!doctype html>")
            assert 'src="/' not in page
            assert 'href="/' not in page


def test_prefixes_are_paths():
    assert Settings(root_path="/a/b-c/").root_path == "/a/b-c"
    assert Settings(root_path="/").root_path == ""
    for bad in ("lora", "/a//b", "/a b", "https://a.example/lora", '/"'):
        with pytest.raises(ValueError, match="beginning of a path"):
            Settings(root_path=bad)
