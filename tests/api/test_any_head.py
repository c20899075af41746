"""Heads changed at random: the fast lane and the framework frame and answer them alike."""

import contextlib
import random
import re

import httpx
import pytest
from conftest import TINY, serving, upload
from test_one_way import connect, corpus, raw

from bonsai_lora.api.app import create_app
from bonsai_lora.api.connection import GuardedProtocol

CASES = 600
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LINES = [
    *[b"Content-Length: " + one for one in (b"0", b"5", b"+5", b"5, 5", b"0x5", b"00", b"5\t")],
    b"Content-Length : 5",
    *[b"Transfer-Encoding: " + one for one in (b"chunked", b"identity", b"gzip, chunked")],
    *[b"Connection: " + one for one in (b"close", b"keep-alive", b"x, close", b"Upgrade")],
    *[b"Upgrade: h2c", b"Connection: upgrade\r\nUpgrade: h2c", b"Trailer: X", b"TE: trailers"],
    *[b" folded", b"\tfolded", b"X: a\r\n b", b"no colon", b": no name", b"X\0: y", b"X: y\0z"],
    *[b"X: \xff\x80", b"X: \x7f", b"Host: y", b"X: " + b"v" * 9000, b"Expect: 200-ok"],
    *[
        b"X-Request-Id: " + one
        for one in (b"mine", b"mine ", b"a\r\nX-Request-Id: b", b"", b"\xff")
    ],
    *[b"Accept: application/json", b"Accept: text/html", b"Accept-Encoding: gzip"],
    *[b"Content-Encoding: identity", b"Content-Type: application/json ; charset=utf-8"],
    *[b"Inference-Header-Content-Length: " + one for one in (b"5", b" ", b"1e2")],
]
VARIABLE = re.compile(
    rb"HTTP/1.1 100 Continue\r\n\r\n"
    rb"|(?i:date|connection|content-length): [^\r]*\r\n|x-request-id: [0-9a-f]{16}\r\n"
    rb'|"request_id":"[0-9a-f]{16}"'
    # What is no request behind one that is being served ends the connection without an answer.
    rb"|(?<=[^\n])HTTP/1.1 400 Bad Request\r\n[^{]*{[^}]*:malformed_request[^}]*}\Z"
)
"""What may differ."""
VERSIONS = [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 ", b""]
METHODS = [b"GET", b"HEAD", b"PUT", b"post", b"OPTIONS", b"DELETE", b"PATCH", b"POST ", b"CONNECT"]
STRAY = [b"\r", b"\n", b" ", b"\t", b"\0", b":", b"\xff", b"\r\n"]
TARGETS = [
    lambda path: b"http://host" + path,
    lambda path: path.replace(b"/", b"%2F", 1),
    lambda path: path.replace(b"a", b"%61"),
    lambda path: path.replace(b"plain", b"%ff"),
    lambda path: path.upper(),
    *[lambda path, end=end: path + end for end in (b"%00", b"%0a", b"?", b"#f", b"/..", b";x", b"?a=%")],
    *[lambda path, more=more: path + more for more in (b"?scale=2&scale=3", b"?scale=%31", b"?dtype=F32&dtype=")],
    *[lambda path, start=start: start + path for start in (b"/", b"/.", b"x", b"*")],
]  # fmt: skip


def changed(numbers, request):
    """A request of the corpus with up to three changes to its head."""
    head, _, body = raw(*request).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    for _ in range(numbers.randrange(4)):
        kind = numbers.random()
        if kind < 0.55:
            lines.insert(numbers.randrange(1, len(lines) + 1), numbers.choice(LINES))
        elif kind < 0.62 and len(lines) > 2:
            del lines[numbers.randrange(1, len(lines))]
        elif kind < 0.7:
            lines[0] = lines[0].replace(b"HTTP/1.1", numbers.choice(VERSIONS))
        elif kind < 0.77:
            lines[0] = lines[0].replace(b"POST", numbers.choice(METHODS), 1)
        elif kind < 0.9:
            path = lines[0].split(b" ")[1] if b" " in lines[0] else b"/"
            lines[0] = lines[0].replace(path, numbers.choice(TARGETS)(path), 1)
        else:
            text = bytearray(b"\r\n".join(lines))
            place = numbers.randrange(len(text))
            text[place : place + numbers.randrange(2)] = numbers.choice(STRAY)
            lines = bytes(text).split(b"\r\n")
    if b"Transfer-Encoding: chunked" in lines and numbers.random() < 0.8:
        lines = [one for one in lines if not one.startswith(b"Content-Length")]
        body = b"%x\r\n%b\r\n0\r\nX-Request-Id: trailer\r\n\r\n" % (len(body), body)
    return b"\r\n".join([*lines, b"", b""]) + body


def exchange(client, sent):
    """All that comes for the request, and for a last one on the same connection."""
    found = b""
    with connect(client) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        found = part = connection.recv(1 << 20)
        if part:
            connection.sendall(HEALTH)
        while part:
            part = connection.recv(1 << 20)
            found += part
    return re.sub(VARIABLE, b"", found)


@pytest.mark.parametrize("seed", [1, 2])
def test_heads_changed_at_random_have_one_answer(settings, seed):
    app = create_app(settings.model_copy(update={"stall_seconds": 0.2}))
    numbers = random.Random(seed)
    requests = [one for one in corpus() if len(one[1]) < 3000]
    statuses = {}
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(app, http=one))))
            for one in (None, GuardedProtocol)
        ]
        upload(clients[0], "plain", TINY / "plain")
        upload(clients[0], "dora", TINY / "dora")
        for _ in range(CASES // 2):
            sent = changed(numbers, numbers.choice(requests))
            first, second = (exchange(one, sent) for one in clients)
            assert first == second, sent
            statuses[first[:12]] = statuses.get(first[:12], 0) + 1
        assert app.state.context.long.in_progress == 0
    assert statuses[b"HTTP/1.1 200"] > CASES // 20
    assert statuses[b"HTTP/1.1 400"] > CASES // 20
