"""Clients that stop in the middle: of a body, or of reading. One service, one request each."""

import contextlib
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from conftest import read_answer, serving, snapshot

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

STALL = 0.8
BINARY, JSON, RAW = "application/vnd.safetensors", "application/json", "application/octet-stream"
D_IN, D_OUT = 1000, 4000
ROWS = 1000
"""16 MB of float32 as outputs: more than sockets hold for a client that does not read."""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A client, and the app; the set `s` has the module m, (1000 -> 4000), of rank 1."""
    root = tmp_path_factory.mktemp("stalls")
    (root / "bases" / "b").mkdir(parents=True)
    weights = {"m.weight": np.zeros((D_OUT, D_IN), np.float32)}
    (root / "bases" / "b" / "model.safetensors").write_bytes(safetensors.encode(weights))
    known = Settings(store=str(root / "store"), bases=str(root / "bases"), stall_seconds=STALL)
    app = create_app(known)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
        client.put("/v1/sets/s/adapters/m", json={"d_in": D_IN, "d_out": D_OUT})
        wide = {"d_in": 2_000_000, "d_out": 2_000_000}
        client.post("/v1/sets", json={"name": "wide", "config": {"rank": 1}})
        client.put("/v1/sets/wide/adapters/m", json=wide)
        client.post("/v1/sets", json={"name": "victim"})
        yield client, app


def connect(client, receive_bytes=None):
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(20)
    made.connect((client.base_url.host, client.base_url.port))
    return made


def head(method, path, media, length):
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Type: {media}", framing]
    return "\r\n".join([*lines, "", ""]).encode()


def rest_of(connection):
    """All that comes until the connection ends; None if it stays open."""
    answer = b""
    try:
        while part := connection.recv(1 << 20):
            answer += part
    except ConnectionResetError:
        return answer
    except TimeoutError:
        return None
    return answer


def wait_until_idle(app):
    deadline = time.monotonic() + 10
    context = app.state.context
    folder = app.state.store.temporary  # an upload has a file before it has a place
    while context.short.in_progress or context.long.in_progress or any(folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


VICTIM = b"DELETE /v1/sets/victim HTTP/1.1\r\nHost: localhost\r\n\r\n"
ONE = "/v1/sets/s/adapters/m/apply"
MULTIPART = "multipart/form-data; boundary=x"
BODIES = {
    "apply, short": ("POST", ONE, BINARY, 5000),
    "apply, long": ("POST", ONE, BINARY, 4_000_000),
    "apply, chunked": ("POST", ONE, BINARY, None),
    "apply, JSON": ("POST", ONE, JSON, 200_000),
    "many": ("POST", "/v1/sets/s/apply", BINARY, 5000),
    "mixed": ("POST", "/v1/apply", JSON, 5000),
    "infer": ("POST", "/v2/models/s/infer", JSON, 5000),
    "infer, long": ("POST", "/v2/models/s/infer", JSON, 4_000_000),
    "create": ("POST", "/v1/sets", JSON, 5000),
    "create, chunked": ("POST", "/v1/sets", JSON, None),
    "weights": ("PUT", "/v1/sets/s/adapters/n", BINARY, 5000),
    "upload": ("PUT", "/v1/sets/u", MULTIPART, 5000),
    "upload, chunked": ("PUT", "/v1/sets/u", MULTIPART, None),
    "merge": ("POST", "/v1/sets/s/adapters/m/merge?dtype=F32", RAW, 4 * D_IN * D_OUT),
    "merge, chunked": ("POST", "/v1/sets/s/adapters/m/merge?dtype=F32", RAW, None),
    "merge, JSON": ("POST", "/v1/sets/s/adapters/m/merge", JSON, 5000),
}


def begun(name):
    """The head of a request and the beginning of its body."""
    method, path, media, length = BODIES[name]
    piece = b"--x\r\n" if media == MULTIPART else b'{"inputs": [' if media == JSON else bytes(40)
    if length is None:
        piece = b"%x\r\n%b\r\n" % (len(piece), piece)
    return head(method, path, media, length) + piece


def test_bodies_that_stop_are_refused_and_their_connections_end(service):
    """What comes later is the rest of the body, whatever it looks like. All at the same time."""
    client, app = service
    before = snapshot(app.state.store)
    with contextlib.ExitStack() as stack:
        waiting = {name: stack.enter_context(connect(client)) for name in BODIES}
        for name, connection in waiting.items():
            connection.sendall(begun(name))
        time.sleep(STALL)
        for name, connection in waiting.items():
            connection.settimeout(3)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                answer = connection.recv(1 << 16)
            if answer:  # an aborted stream has no status left to give
                assert answer.startswith(b"HTTP/1.1 408 "), (name, answer)
                told = json.loads(answer.partition(b"\r\n\r\n")[2])
                assert "error" in told if "infer" in name else told["code"] == "stalled"
            else:
                assert "merge" in name, name
            with contextlib.suppress(OSError):
                connection.sendall(VICTIM * 3)
            assert rest_of(connection) == b"", f"{name}: the connection goes on"
    wait_until_idle(app)
    assert snapshot(app.state.store) == before


@pytest.mark.parametrize("name", BODIES)
def test_a_client_that_goes_away_in_its_body_leaves_nothing(service, name):
    client, app = service
    before = snapshot(app.state.store)
    with connect(client) as connection:
        connection.sendall(begun(name))
        time.sleep(0.02)
    wait_until_idle(app)
    assert snapshot(app.state.store) == before
    assert list(app.state.store.temporary.iterdir()) == []


def applied():
    body = safetensors.encode({"inputs": np.zeros((ROWS, D_IN), np.float32)})
    return head("POST", ONE, BINARY, len(body)) + body


def got(path, *lines):
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *lines, "", ""]
    return lambda: "\r\n".join(lines).encode()


LONG_ANSWERS = {
    "apply": applied,
    "weights of a set": got("/v1/sets/wide/adapter_model.safetensors"),
    "merged file": got("/v1/bases/b/merged/s/model.safetensors"),
    "a range of it": got("/v1/bases/b/merged/s/model.safetensors", "Range: bytes=99-15999999"),
}


def ask(connection, sent):
    """Send without waiting for the other side, which may not read before it is read from."""
    thread = threading.Thread(target=lambda: _send(connection, sent))
    thread.start()
    return thread


def _send(connection, sent):
    with contextlib.suppress(OSError):
        connection.sendall(sent)


def test_clients_that_read_nothing_of_their_one_answer_are_disconnected(service):
    """All at the same time."""
    client, app = service
    with contextlib.ExitStack() as stack:
        waiting = {name: stack.enter_context(connect(client, 4096)) for name in LONG_ANSWERS}
        threads = [ask(one, LONG_ANSWERS[name]()) for name, one in waiting.items()]
        time.sleep(2.5 * STALL)
        wait_until_idle(app)
        for thread in threads:
            thread.join(10)
        for name, connection in waiting.items():
            connection.settimeout(5)
            answer = rest_of(connection)
            assert answer is not None, f"{name}: the connection goes on"
            assert len(answer) < 15_000_000, f"{name}: all of it came"
    assert client.get("/healthz").status_code == 200


def missing_of(answer):
    """How many bytes of an answer have not come; 1 where its head is not whole."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return 1
    length = bytes(answer[:end]).lower().split(b"content-length: ")[1].split(b"\r\n")[0]
    return end + 4 + int(length) - len(answer)


def test_clients_that_read_slowly_get_their_one_answer(service):
    """Every pause is shorter than the stall time, the whole takes far longer."""
    client, _ = service
    answers = {name: bytearray() for name in LONG_ANSWERS}

    def read(name):
        answer = answers[name]
        with connect(client, 1 << 16) as connection:
            thread = ask(connection, LONG_ANSWERS[name]())
            while missing_of(answer) and (part := connection.recv(1 << 17)):
                if (len(answer) + len(part)) >> 21 > len(answer) >> 21:
                    time.sleep(STALL / 3)
                answer += part
            thread.join(10)

    threads = [threading.Thread(target=read, args=(name,)) for name in LONG_ANSWERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, answer in answers.items():
        assert len(answer) > 15_000_000, name
        assert missing_of(answer) == 0, name


def test_clients_that_send_slowly_are_served(service):
    """A body in small pieces: each arrives before the stall timeout, all of them after it."""
    client, _ = service
    body = json.dumps({"inputs": [0] * D_IN}).encode()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(client)) for _ in range(2)]
        connections[0].sendall(head("POST", ONE, JSON, len(body)))
        connections[1].sendall(head("POST", ONE, JSON, None))
        step = len(body) // 12
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            connections[0].sendall(piece)
            connections[1].sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(STALL / 6)
        connections[1].sendall(b"0\r\n\r\n")
        for connection in connections:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


WHOLE = {
    "health": ("GET", "/healthz", JSON, b""),
    "set": ("GET", "/v1/sets/s", JSON, b""),
    "create": ("POST", "/v1/sets", JSON, b'{"name": "half"}'),
    "delete": ("DELETE", "/v1/sets/half", JSON, b""),
    "apply": ("POST", ONE, BINARY, safetensors.encode({"inputs": np.ones(D_IN, np.float32)})),
    "apply, long": ("POST", ONE, BINARY, safetensors.encode({"inputs": np.ones((100, D_IN), np.float32)})),
    "apply, JSON": ("POST", ONE, JSON, json.dumps({"inputs": [1] * D_IN}).encode()),
    "apply, in a thread": ("POST", ONE, JSON, json.dumps({"inputs": [[1] * D_IN] * 400}).encode()),
    "merge": ("POST", "/v1/sets/s/adapters/m/merge?dtype=F16", RAW, bytes(2 * D_IN * D_OUT)),
    "weights of a set": ("GET", "/v1/sets/s/adapter_model.safetensors", JSON, b""),
    "merged file": ("GET", "/v1/bases/b/merged/s/model.safetensors", JSON, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_client_that_ends_its_side_gets_the_answer_to_what_it_sent(service, name):
    """A half-closed connection (RFC 9112, section 9.6): the answer comes, and the end."""
    client, _ = service
    method, path, media, body = WHOLE[name]
    with connect(client) as connection:
        connection.sendall(head(method, path, media, len(body)) + body)
        connection.shutdown(socket.SHUT_WR)
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 2"), answer[:100]
    assert answer.startswith(b"HTTP/1.1 204") or missing_of(answer) == 0


@pytest.mark.parametrize("name", BODIES)
def test_a_client_that_ends_its_side_in_its_body_is_disconnected(service, name):
    client, app = service
    with connect(client) as connection:
        connection.sendall(begun(name))
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(STALL / 2)
        assert rest_of(connection) == b""
    wait_until_idle(app)


def test_a_long_body_that_waits_for_100_continue(client):
    """As curl sends it, on a route that the framework serves."""
    body = b'{"name": "waited"}'
    head = (
        b"POST /v1/sets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with connect(client) as connection:
        connection.sendall(head)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert read_answer(connection)[0] == 201
