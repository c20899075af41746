"""Requests that are sent before the earlier ones are answered wait in the kernel, not as objects."""

import random
import re
import socket

import httpx
import pytest
from conftest import serving
from test_one_way import connect
from test_resources import LANES

from bonsai_lora.api.app import create_app
from bonsai_lora.api.connection import GuardedProtocol
from bonsai_lora.api.middleware import Observer

COUNT = 500
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(**LANES)
def service(request, settings):
    app = create_app(settings)
    with serving(app, http=request.param) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
        client.put("/v1/sets/s/adapters/m", json={"d_in": 1, "d_out": 1})
        yield client


def statuses(connection, count):
    """Return the statuses of so many responses; fewer if the connection ends."""
    answer, found = b"", []
    while len(found) < count or not answer.endswith((b"}", b"\r\n\r\n")):
        part = connection.recv(1 << 16)
        if not part:
            break
        answer += part
        found = [int(one) for one in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
    return found


@pytest.mark.parametrize("first", [b"", b"POST"], ids=["heads", "heads behind a body"])
@pytest.mark.parametrize("ends", [False, True])
def test_no_pipelined_request_is_begun_before_the_one_before_it_is_answered(
    service, first, ends, monkeypatch
):
    """A megabyte of heads was 50 MB of objects, and 0.4 s in which nothing else was served."""
    waiting = []

    def noted(self, _begin=GuardedProtocol.on_headers_complete):
        _begin(self)
        waiting.append(len(self.pipeline))

    monkeypatch.setattr(GuardedProtocol, "on_headers_complete", noted)
    if first:
        body = b'{"name": "n", "config": {"rank": 1}}'
        first = (
            b"POST /v1/sets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
    with connect(service) as connection:
        connection.sendall(first + COUNT * GET)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        found = statuses(connection, COUNT + bool(first))
    assert found == [201] * bool(first) + [200] * COUNT
    assert len(waiting) == COUNT + bool(first)
    assert max(waiting) == 0


def chunked(body, rng):
    parts, at = [], 0
    while at < len(body):
        size = rng.randrange(1, 700)
        part = body[at : at + size]
        parts.append(b"%x\r\n%b\r\n" % (len(part), part))
        at += size
    return b"".join([*parts, b"0\r\n\r\n"])


def any_request(rng, number):
    """Return a request and the status of its answer."""
    kind = rng.randrange(4)
    if kind == 0:
        return GET, 200
    if kind == 1:
        padding = "x" * rng.randrange(5000)
        head = (
            f"GET /v1/sets/none{number} HTTP/1.1\r\nHost: localhost\r\nX-Padding: {padding}\r\n\r\n"
        )
        return head.encode(), 404
    blanks = b" " * rng.choice([0, 10, 3000, 80_000])
    path, body, status = rng.choice(
        [
            ("/v1/sets/s/adapters/m/apply", b'{"inputs": [1]%b}' % blanks, 200),
            ("/v1/sets", b'{"name": "n%d", "config": {"rank": 1}%b}' % (number, blanks), 201),
        ]
    )
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    if kind == 2:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, rng), status
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body, status


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_pipelined_requests_is_answered_in_order(service, seed):
    rng = random.Random(seed)
    requests, expected = zip(*(any_request(rng, number) for number in range(60)), strict=True)
    sent, at = b"".join(requests), 0
    with connect(service) as connection:
        while at < len(sent):
            size = rng.choice([1, 100, 5000, 100_000, len(sent)])
            connection.sendall(sent[at : at + size])
            at += size
        connection.shutdown(socket.SHUT_WR)
        assert statuses(connection, len(expected)) == list(expected)


@pytest.mark.parametrize("is_split", [False, True])
def test_what_is_no_request_is_refused_after_the_answer_to_the_one_before_it(service, is_split):
    parts = [GET, b"POST /v1/sets HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"]
    with connect(service) as connection:
        for part in parts if is_split else [b"".join(parts)]:
            connection.sendall(part)
        assert statuses(connection, 2) == [200, 400]


def test_a_refused_client_that_waits_to_send_its_body_causes_no_error(service, monkeypatch):
    """`100 Continue` was written after the end of the connection."""
    failures = []
    monkeypatch.setattr(Observer, "note_failure", lambda _, scope: failures.append(scope))
    head = b"POST /v1/sets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    for _ in range(20):
        with connect(service) as connection:
            connection.sendall(head + b"not a chunk\r\n")
            assert 400 in statuses(connection, 1)
    assert failures == []
