"""Hosts, targets and versions of requests (RFC 9112); behind the fast lane and without it."""

import json
import socket

import httpx
import pytest
from conftest import read_answer, serving, snapshot
from test_one_way import connect

from bonsai_lora.api.app import create_app

APPLY = "/v1/sets/s/adapters/m/apply"
BODY = b'{"inputs": [1, 2]}'


@pytest.fixture(scope="module", params=["auto", "off"], ids=["fast lane", "framework"])
def service(request, tmp_path_factory):
    from bonsai_lora.settings import Settings

    settings = Settings(
        store=str(tmp_path_factory.mktemp("store")), fast_lane=request.param, no_auth=True
    )
    app = create_app(settings)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s"})
        client.put("/v1/sets/s/adapters/m", json={"d_in": 2, "d_out": 2})
        client.app = app
        yield client


def ask(client, line, *lines):
    """Return the status and body of the answer to a request, which has BODY if it is a POST."""
    body = BODY if line.startswith("POST") else b""
    more = ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
    with connect(client) as connection:
        connection.sendall("\r\n".join([line, *lines, *more, "", ""]).encode() + body)
        status, answer, _ = read_answer(connection)
    return status, answer


TARGETS = [
    ("http://evil.example", "localhost", 421),
    ("https://evil.example:80", "localhost", 421),
    ("HTTP://localhost:99", "evil.example", 200),
    ("http://127.0.0.1", "evil.example", 200),
    ("http://[::1]:8000", "evil.example", 200),
    ("http://me:secret@localhost", "localhost", 400),
    ("http://", "localhost", 400),
    ("ftp://localhost", "localhost", 400),
]


@pytest.mark.parametrize(("start", "host", "status"), TARGETS)
@pytest.mark.parametrize("asked", ["GET /v1/sets", f"POST {APPLY}", "DELETE /v1/sets/absent"])
def test_the_host_of_an_absolute_target_counts(service, start, host, status, asked):
    before = snapshot(service.app.state.store)
    method, path = asked.split()
    found, answer = ask(service, f"{method} {start}{path} HTTP/1.1", f"Host: {host}")
    if method == "DELETE" and status == 200:
        status = 404
    assert found == status, answer
    if status == 421:
        assert json.loads(answer)["got"] == start.partition("://")[2]
    assert snapshot(service.app.state.store) == before


@pytest.mark.parametrize("rest", ["", "?x=1"])
def test_an_absolute_target_may_have_no_path(service, rest):
    status, _ = ask(service, f"GET http://localhost{rest} HTTP/1.1", "Host: localhost")
    assert status == ask(service, "GET / HTTP/1.1", "Host: localhost")[0] == 200


@pytest.mark.parametrize("asked", ["GET /healthz", "GET /v1/sets", f"POST {APPLY}"])
@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Host: localhost", "Host: localhost"],
        ["Host: localhost", "Host: evil.example"],
        ["Host: local host"],
        ["Host: http://localhost"],
    ],
)
def test_http_1_1_has_one_host(service, asked, lines):
    status, answer = ask(service, f"{asked} HTTP/1.1", *lines)
    assert (status, json.loads(answer)["code"]) == (400, "malformed_request")


def test_http_1_0_needs_none(service):
    assert ask(service, "GET /v1/sets HTTP/1.0")[0] == 200
    assert ask(service, f"POST {APPLY} HTTP/1.0")[0] == 200
    assert ask(service, "GET /v1/sets HTTP/1.0", "Host: evil.example")[0] == 421


@pytest.mark.parametrize("version", ["", " HTTP/0.9", " HTTP/1.2", " HTTP/2.0", " HTTP/3.0"])
@pytest.mark.parametrize("asked", ["GET /healthz", f"POST {APPLY}"])
def test_other_versions_are_refused(service, asked, version):
    before = service.app.state.context.short.in_progress
    status, answer = ask(service, f"{asked}{version}", *(["Host: localhost"] if version else []))
    assert (status, json.loads(answer)["code"]) == (400, "malformed_request")
    assert service.app.state.context.short.in_progress == before


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_only_http_1_1_gets_100_continue(service, version):
    head = f"POST {APPLY} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Expect: 100-continue\r\nContent-Length: {len(BODY)}\r\n\r\n"
    with connect(service) as connection:
        connection.sendall(head.encode())
        connection.settimeout(0.3 if version == "1.0" else 10)
        if version == "1.0":
            with pytest.raises(TimeoutError):
                connection.recv(1, socket.MSG_PEEK)
        else:
            assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.settimeout(10)
        connection.sendall(BODY)
        status, answer, _ = read_answer(connection)
        assert (status, len(json.loads(answer)["outputs"])) == (200, 2)
