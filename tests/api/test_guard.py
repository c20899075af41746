"""What a client sends that is not a plain request, in bytes; behind the fast lane and without it."""

import contextlib
import json
import socket
import time

import httpx
import numpy as np
import pytest
from conftest import TINY, serving, upload
from test_apply import Q_PROJ
from test_one_way import BINARY, JSON, MANY, ONE, batch, body_of, connect, raw, read_answer

from bonsai_lora.api.app import create_app
from bonsai_lora.api.call import join_headers
from bonsai_lora.api.connection import MAX_HEAD_BYTES, GuardedProtocol
from bonsai_lora.cli.logs import configure_logging
from bonsai_lora.formats import safetensors

STALL = 0.4
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
DELETE = b"DELETE /v1/sets/plain HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=[None, GuardedProtocol], ids=["fast lane", "framework"])
def guarded(request, settings):
    """A client of a service with a short stall time."""
    app = create_app(settings.model_copy(update={"stall_seconds": STALL}))
    options = {"timeout_keep_alive": 30}
    with (
        serving(app, http=request.param, **options) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        upload(client, "plain", TINY / "plain")
        yield client


def ends(connection):
    """Whether the server ends the connection without saying more."""
    connection.settimeout(5 * STALL)
    with contextlib.suppress(TimeoutError):
        return connection.recv(1000) == b""
    return False


@pytest.mark.parametrize(
    ("asked", "status", "more"),
    [
        (HEALTH, 200, b"\r\n"),
        (raw(ONE, body_of(batch())), 200, b"\r\n\r\n"),
        (raw("/v1/nowhere", bytes(1000))[:-1000], 404, b"x"),
        (raw("/v1/sets", bytes(1000), BINARY)[:-1000], 415, bytes(10)),
    ],
    ids=["empty line", "after the fast lane", "body of a 404", "body of a 415"],
)
def test_bytes_that_begin_no_request_do_not_keep_a_connection(guarded, asked, status, more):
    with connect(guarded) as connection:
        connection.sendall(asked)
        assert read_answer(connection)[0] == status
        time.sleep(0.02)
        connection.sendall(more)
        assert ends(connection)


def test_a_refused_body_may_come_for_longer_than_the_stall_time(guarded):
    with connect(guarded) as connection:
        connection.sendall(raw("/v1/nowhere", bytes(1000))[:-1000])
        assert read_answer(connection)[0] == 404
        for _ in range(5):
            time.sleep(STALL / 2)
            connection.sendall(bytes(200))
        connection.sendall(HEALTH)
        assert read_answer(connection)[0] == 200


def chunked(path, *parts, trailers=b""):
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head += ["Transfer-Encoding: chunked", "", ""]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return "\r\n".join(head).encode() + chunks + b"0\r\n" + trailers + b"\r\n"


@pytest.mark.parametrize("before", [b"", HEALTH, raw(ONE, body_of(batch()))])
@pytest.mark.parametrize("path", [ONE, "/v1/sets"])
def test_a_chunk_that_is_none_is_refused_at_once(guarded, path, before):
    bad = chunked(path, b'{"inputs": [').replace(b"0\r\n\r\n", b"zz\r\n" + DELETE)
    with connect(guarded) as connection:
        if before:
            connection.sendall(before)
            assert read_answer(connection)[0] == 200
        began = time.monotonic()
        connection.sendall(bad)
        status, answer, _ = read_answer(connection)
        assert (status, json.loads(answer)["code"]) == (400, "malformed_request")
        assert time.monotonic() - began < STALL
        assert ends(connection)
    assert guarded.get("/v1/sets/plain").status_code == 200


def test_a_pipelined_chunk_that_is_none_is_refused_at_once(settings):
    """The stall timeout is far away; the request before it gets its response."""
    app = create_app(settings.model_copy(update={"stall_seconds": 60}))
    with serving(app) as url, httpx.Client(base_url=url) as client, connect(client) as connection:
        head = b"POST /v1/sets HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(HEALTH + head + b"zz\r\n")
        status, _, rest = read_answer(connection)
        assert status == 200
        status, answer, _ = read_answer(connection, rest)
        assert (status, json.loads(answer)["code"]) == (400, "malformed_request")
        assert ends(connection)


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("pause", [0, 0.05])
def test_the_body_of_a_request_with_upgrade_is_no_request(guarded, is_chunked, pause):
    """The parser takes what follows such a head for another protocol."""
    sent = chunked(ONE, DELETE) if is_chunked else raw(ONE, DELETE, JSON)
    head, _, body = sent.partition(b"\r\n\r\n")
    head += (
        b"\r\nConnection: keep-alive, Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    )
    with connect(guarded) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            connection.sendall(head)
            time.sleep(pause)
            connection.sendall(body + HEALTH)
            status, answer, rest = read_answer(connection)
            assert (status, json.loads(answer)["code"]) == (400, "malformed_json")
            status, _, rest = read_answer(connection, rest)
            assert (status, rest) == (200, b"")
    assert guarded.get("/v1/sets/plain").status_code == 200


def test_a_request_with_upgrade_gets_its_answer(guarded):
    x = batch()
    headers = BINARY | {"Connection": "Upgrade", "Upgrade": "h2c"}
    upgraded = guarded.post(ONE, content=body_of(x), headers=headers)
    assert upgraded.status_code == 200
    assert upgraded.content == guarded.post(ONE, content=body_of(x), headers=BINARY).content


@pytest.mark.parametrize("target", ["/healthz", "host:443"])
def test_connect_is_refused(guarded, target):
    with connect(guarded) as connection:
        connection.sendall(raw(target, b"", {}, "CONNECT") + DELETE)
        assert read_answer(connection)[0] == 400
        assert ends(connection)
    assert guarded.get("/v1/sets/plain").status_code == 200


def test_trailers_are_no_headers(guarded):
    trailers = b"X-Request-Id: trailer\r\nContent-Type: text/plain\r\n"
    body = json.dumps({"inputs": batch().tolist()}).encode()
    with connect(guarded) as connection:
        connection.sendall(chunked(ONE, body, trailers=trailers))
        head = connection.recv(1 << 16, socket.MSG_PEEK)
        assert read_answer(connection)[0] == 200
        assert b"x-request-id: trailer" not in head
        connection.sendall(HEALTH)
        assert read_answer(connection)[0] == 200


@pytest.mark.parametrize("space", [b"", b" ", b"\t "])
def test_white_space_behind_a_header_is_not_part_of_it(guarded, space):
    lines = {"Content-Type": "application/vnd.safetensors", "X-Request-Id": "mine"}
    sent = raw(ONE, body_of(batch()), lines).replace(b": mine", b": mine" + space)
    for framing in (b"Content-Length: 896", b"Content-Length: 896\r\nConnection: close"):
        with connect(guarded) as connection:
            connection.sendall(sent.replace(b"Content-Length: 896", framing))
            head = connection.recv(1 << 16, socket.MSG_PEEK)
            assert read_answer(connection)[0] == 200
            assert b"\r\nx-request-id: mine\r\n" in head


@pytest.mark.parametrize("size", [4, 500])
@pytest.mark.parametrize("cut", [-10, 60])
def test_whole_requests_before_one_that_never_comes_are_answered(guarded, capfd, size, cut):
    """The client ends its side in the third, while the second is computed in a thread."""
    body = json.dumps({"inputs": {Q_PROJ: batch(size).tolist()}}).encode()
    begun = raw("/v1/sets", b'{"name": "never"}', JSON)[:cut]
    with connect(guarded) as connection:
        connection.sendall(HEALTH + chunked(MANY, body) + HEALTH + begun)
        connection.shutdown(socket.SHUT_WR)
        rest = b""
        for _ in range(3):
            status, _, rest = read_answer(connection, rest)
            assert status == 200
        assert rest == b""
        assert ends(connection)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("path", [ONE, "/v1/sets"])
def test_trailers_have_the_limits_of_heads(guarded, path):
    many = b"X-Long: %b\r\n" % (b"v" * 1000) * (2 * MAX_HEAD_BYTES // 1000)
    with connect(guarded) as connection:
        connection.sendall(chunked(path, b"{}", trailers=many)[:-2])
        assert read_answer(connection)[0] == 431


@pytest.mark.parametrize(("size", "status"), [(500, 200), (900, 431)])
def test_a_head_in_pieces_is_counted_once(guarded, size, status):
    """80 lines of these sizes make 40 and 72 kB."""
    lines = {f"X-{number}": "v" * size for number in range(80)}
    sent = raw("/healthz", b"", lines, "GET")
    with connect(guarded) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # the server may close before all is sent
            for start in range(0, len(sent), 700):
                connection.sendall(sent[start : start + 700])
                time.sleep(0.001)
        assert read_answer(connection)[0] == status


@pytest.mark.parametrize("http", [None, GuardedProtocol], ids=["fast lane", "framework"])
@pytest.mark.parametrize("ending", ["Connection: close", "half-close", "keep-alive time"])
def test_a_closed_connection_does_not_wait_for_its_reader(settings, http, ending):
    """What has not been sent when a connection is closed is less than what stops writing."""
    app = create_app(settings.model_copy(update={"stall_seconds": STALL}))
    body = safetensors.encode({"inputs": np.zeros((1, 4), np.float32)})
    headers = BINARY | ({"Connection": "close"} if ending == "Connection: close" else {})
    with socket.socket() as listener, socket.socket() as connection:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        options = {"fd": listener.fileno(), "timeout_keep_alive": 0.2}
        with serving(app, http=http, **options) as url, httpx.Client(base_url=url) as client:
            client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
            client.put("/v1/sets/s/adapters/m", json={"d_in": 4, "d_out": 15_000})
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(10)
            connection.connect(listener.getsockname())
            connection.sendall(raw("/v1/sets/s/adapters/m/apply", body, headers))
            if ending == "half-close":
                time.sleep(0.1)
                connection.shutdown(socket.SHUT_WR)
            time.sleep(4 * STALL)
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 16):
                    got += len(part)
            assert 0 < got < 60_000


@pytest.mark.parametrize("path", ["/v1/sets/a{}/apply", "/v1/nowhere{}"])
def test_a_path_cannot_write_lines_of_the_log(guarded, path, capfd):
    configure_logging("info", "console")
    written, late = "", time.monotonic() + 5
    try:
        for code in ("%0a", "%0d", "%1b[31m", "%e2%80%a8", "%c2%85"):
            guarded.post(path.format(f"{code}forged"))
        while written.count("request_id=") < 5 and time.monotonic() < late:
            written += capfd.readouterr().err  # a line is written after its response
    finally:
        configure_logging("warning", "console")
    lines = [one for one in written.splitlines() if "[httpx]" not in one]
    assert len(lines) == 5
    assert all(one.count("[bonsai_lora.requests]") == 1 for one in lines)
    assert "\x1b" not in written


@pytest.mark.parametrize(
    "start", ["GET /healthz?", "GET /healthz HTTP/1.1\r\nx: ", "GET / HTTP/1.1\r\n"]
)
@pytest.mark.parametrize("pieces", [1, 9])
def test_a_line_that_does_not_end_is_refused_when_it_is_too_long(guarded, start, pieces):
    head = start.encode() + b"a" * (MAX_HEAD_BYTES + 5000)
    with connect(guarded) as connection:
        began = time.monotonic()
        step = -(-len(head) // pieces)
        for place in range(0, len(head), step):
            connection.sendall(head[place : place + step])
            time.sleep(0.005)
        assert read_answer(connection)[0] == 431
        assert time.monotonic() - began < STALL


def test_repeated_headers_are_joined_in_one_pass():
    lines = [(b"x-%d" % (number % 20_000), b"%d" % number) for number in range(20_003)]
    began = time.thread_time()
    headers = join_headers(lines)
    assert time.thread_time() - began < 1
    assert headers[b"x-2"] == b"2, 20002"
    assert (headers[b"x-3"], len(headers)) == (b"3", 20_000)
