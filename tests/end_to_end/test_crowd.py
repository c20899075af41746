"""More connections than file descriptors."""

import contextlib
import socket
import ssl
import time

import httpx
import pytest
from test_command import COMMAND, running
from test_tls_and_paths import CERTIFICATE, KEY


def test_connections_beyond_the_descriptors_get_503(tmp_path):
    command = ("prlimit", "--nofile=200:200", COMMAND)
    with running("--store", str(tmp_path), command=command) as (url, _):
        assert httpx.post(f"{url}/v1/sets", json={"name": "s"}).status_code == 201
        host, _, port = url.removeprefix("http://").partition(":")
        with contextlib.ExitStack() as stack:
            for _ in range(220):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            time.sleep(1.5)  # those that were refused are closed
            answer = httpx.get(f"{url}/v1/sets/s", timeout=10)
            assert (answer.status_code, answer.json()["code"]) == (503, "busy")
            assert answer.headers["retry-after"] == "1"
        deadline = time.monotonic() + 10
        while httpx.get(f"{url}/v1/sets/s/stats").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.post(f"{url}/v1/sets", json={"name": "t"}).status_code == 201


def test_they_get_it_through_tls_too(tmp_path):
    command = ("prlimit", "--nofile=200:200", COMMAND)
    flags = ["--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY)]
    trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
    with running("--store", str(tmp_path), *flags, command=command) as (url, _):
        host, _, port = url.removeprefix("https://").partition(":")
        with contextlib.ExitStack() as stack:
            status = 200
            for _ in range(200):
                raw = socket.create_connection((host, int(port)), timeout=10)
                wrapped = trusted.wrap_socket(raw, server_hostname=host, suppress_ragged_eofs=False)
                one = stack.enter_context(wrapped)
                one.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = one.recv(1 << 16)
                status = int(answer.split()[1])
                if status != 200:
                    break
            assert status == 503
            assert one.recv(1) == b""  # closed in TLS's way, not aborted
        deadline = time.monotonic() + 10  # for the service to close its side of them
        while httpx.get(f"{url}/healthz", verify=trusted).status_code != 200:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("lane", ["auto", "off"])
def test_connections_in_a_handshake_count(tmp_path, lane):
    command = ("prlimit", "--nofile=200:200", COMMAND)
    flags = ["--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY), "--stall-seconds", "3"]
    flags += ["--fast-lane", lane]
    trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
    with running("--store", str(tmp_path), *flags, command=command) as (url, _):
        host, _, port = url.removeprefix("https://").partition(":")
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            answer = httpx.get(f"{url}/v1/sets", timeout=10, verify=trusted)
            assert (answer.status_code, answer.json()["code"]) == (503, "busy")
            time.sleep(4)  # the handshakes have stalled
            assert httpx.get(f"{url}/v1/sets", timeout=10, verify=trusted).status_code == 200


def test_more_connections_than_descriptors_wait_in_the_backlog(tmp_path):
    """They are refused one after the other; files can be opened all the while."""
    command = ("prlimit", "--nofile=150:150", COMMAND)
    with running("--store", str(tmp_path), "--stall-seconds", "60", command=command) as (url, _):
        host, _, port = url.removeprefix("http://").partition(":")
        with (
            httpx.Client(base_url=url, timeout=10) as client,
            contextlib.ExitStack() as stack,
        ):
            assert client.post("/v1/sets", json={"name": "s0"}).status_code == 201
            for _ in range(400):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            for number in range(1, 20):
                assert client.post("/v1/sets", json={"name": f"s{number}"}).status_code == 201
                time.sleep(0.05)
