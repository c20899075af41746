"""More connections than file descriptors."""

import contextlib
import socket
import time

import httpx
from test_command import COMMAND, running


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
