"""Long bodies read straight from the socket: every way in which a client can send one."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from conftest import TINY, connect, read_answer, serving, upload
from test_apply import Q_PROJ
from uvicorn.server import ServerState

from bonsai_lora.api.app import create_app
from bonsai_lora.api.pace import Pace
from bonsai_lora.errors import BusyError, StalledError
from bonsai_lora.fast_lane.call import LONG_BYTES
from bonsai_lora.fast_lane.protocol import LaneConnection, LaneProtocol
from bonsai_lora.formats import safetensors

ROWS = 1 + LONG_BYTES // 256
"""Rows of 64 numbers that make a body just long enough."""


def path_of(module=Q_PROJ):
    return f"/v1/sets/plain/adapters/{module}/apply"


def head_of(length, path=None, **headers):
    lines = [f"POST {path or path_of()} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    lines += ["Content-Type: application/vnd.safetensors"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def batch(rows=ROWS, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)
    return x, safetensors.encode({"inputs": x})


def expected(client, x):
    """By the form that is never read directly."""
    body = {"inputs": x[:300].tolist()}
    return np.array(client.post(path_of(), json=body).json()["outputs"], np.float32)


def outputs(body):
    return safetensors.decode(body)[0]["outputs"]


@pytest.mark.parametrize("sizes", [[1 << 30], [1], [1000, 1, 65536], [65537], [LONG_BYTES - 1, 1]])
def test_a_body_in_pieces_of_any_size(plain, sizes):
    x, body = batch()
    right = expected(plain, x)
    with connect(plain) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):  # the connection can be used again
            connection.sendall(head_of(len(body)))
            at = 0
            for number in range(60):
                size = sizes[number % len(sizes)]
                connection.sendall(body[at : at + size])
                at += size
                time.sleep(0.001)
            connection.sendall(body[at:])
            status, answer, rest = read_answer(connection)
            assert (status, rest) == (200, b"")
            got = outputs(answer)
            assert got.shape == (ROWS, 128)
            assert np.abs(got[:300] - right).max() < 1e-5


def test_pipelined_requests(plain):
    """The next request starts in the packet in which the body ends."""
    x, body = batch()
    y, other = batch(seed=1)
    small = json.dumps({"inputs": [0.5] * 64}).encode()
    short = head_of(len(small)).replace(b"vnd.safetensors", b"json") + small
    with connect(plain) as connection:
        sent = head_of(len(body)) + body + short + head_of(len(other)) + other + short
        threading.Thread(target=connection.sendall, args=(sent,)).start()
        rest = b""
        for wanted in (x, None, y, None):
            status, answer, rest = read_answer(connection, rest)
            assert status == 200
            if wanted is not None:
                assert np.abs(outputs(answer)[:300] - expected(plain, wanted)).max() < 1e-5
        assert rest == b""


def test_expect_100_continue(plain):
    x, body = batch()
    with connect(plain) as connection:
        connection.sendall(head_of(len(body), Expect="100-continue"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        status, answer, _ = read_answer(connection)
        assert status == 200
        assert outputs(answer).shape == (len(x), 128)


def test_errors_before_the_body(plain):
    """A request refused by its head gets its response; the connection continues or is closed."""
    _, body = batch()
    for path, headers, status in (
        (path_of("nothing"), {}, 404),
        (path_of() + "?scale=x", {}, 422),
        (path_of(), {"Accept": "text/html"}, 406),
    ):
        with connect(plain) as connection:
            connection.sendall(head_of(len(body), path, **headers) + body)
            got, answer, _ = read_answer(connection)
            assert got == status, answer
    with connect(plain) as connection:
        connection.sendall(head_of(1 << 40))
        assert read_answer(connection)[0] == 413
    assert plain.get("/healthz").status_code == 200


def test_a_client_that_disconnects(plain):
    _, body = batch()
    for cut in (0, 10, len(body) // 2, len(body) - 1):
        with connect(plain) as connection:
            connection.sendall(head_of(len(body)) + body[:cut])
    assert plain.get("/healthz").status_code == 200


def test_admission_is_released(app, plain):
    _, body = batch()
    for cut, places in ((0, 0), (len(body) // 2, 1)):
        with connect(plain) as connection:
            connection.sendall(head_of(len(body)) + body[:cut])
            time.sleep(0.05)
            assert app.state.context.short.in_progress == places
    deadline = time.monotonic() + 10
    while app.state.context.short.in_progress:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_heads_that_are_never_completed(settings):
    """Nothing, the beginning of a head, and heads byte by byte: all are closed in time."""
    heads = [b"", b"GET /v1", b"GET /v1/seeeeeeeeeeets", b"POST /v1/sets/plain/ad"]
    app = create_app(settings.model_copy(update={"stall_seconds": 0.4}))
    with (
        serving(app) as url,
        httpx.Client(base_url=url) as client,
        contextlib.ExitStack() as stack,
    ):
        began = time.monotonic()
        waiting = [stack.enter_context(connect(client)) for _ in heads]
        for place in range(max(map(len, heads))):
            for connection, head in zip(waiting, heads, strict=True):
                with contextlib.suppress(OSError):
                    connection.sendall(head[place : place + 1])
            time.sleep(0.05)
            if place == 2:
                waiting[0].setblocking(False)
                with pytest.raises(BlockingIOError):
                    waiting[0].recv(100)
                waiting[0].settimeout(20)
        for connection in waiting:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        assert time.monotonic() - began < 5


def test_a_head_in_pieces(settings):
    app = create_app(settings.model_copy(update={"stall_seconds": 0.4}))
    with serving(app) as url, httpx.Client(base_url=url) as client, connect(client) as connection:
        for piece in (b"GET /v1/stats HT", b"TP/1.1\r\nHost: localhost\r\n", b"\r\n"):
            connection.sendall(piece)
            time.sleep(0.1)
        assert read_answer(connection)[0] == 200
        time.sleep(0.6)  # and its connection stays open, for as long as any
        connection.sendall(b"GET /v1/stats HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(connection)[0] == 200


def test_invalid_bodies(plain):
    _, body = batch()
    for bad in (bytes(len(body)), b"\xff" * len(body), body[:-4] + b"\x00\x00\xc0\x7f"):
        headers = {"Content-Type": "application/vnd.safetensors"}
        answer = plain.post(path_of(), content=bad, headers=headers)
        assert answer.status_code in (400, 422), answer.text


def test_infer_with_a_long_body(plain):
    x, _ = batch()
    tensor = {"name": Q_PROJ, "shape": list(x.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = plain.post("/v2/models/plain/infer", content=head + x.tobytes(), headers=headers)
    length = int(answer.headers["Inference-Header-Content-Length"])
    got = np.frombuffer(answer.content[length:], np.float32).reshape(-1, 128)
    assert np.abs(got[:300] - expected(plain, x)).max() < 1e-5


def test_long_json(plain):
    x, _ = batch()
    answer = plain.post(path_of(), json={"inputs": x.tolist()})
    assert np.array(answer.json()["outputs"]).shape == (ROWS, 128)


class Transport(asyncio.Transport):
    """What a protocol needs of a transport, with what was written."""

    def __init__(self):
        super().__init__()
        self.written = b""

    def write(self, data):
        self.written += bytes(data)

    def writelines(self, parts):
        self.written += b"".join(map(bytes, parts))

    def is_closing(self):
        return False

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def get_write_buffer_size(self):
        return 0

    def close(self):
        pass


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t "])
def test_whitespace_after_a_content_length(plain, space):
    """It is legal (RFC 9110, section 5.5); the body must not be parsed as a request."""
    inner = b"DELETE /v1/sets/plain HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = head_of(len(inner)).replace(b"\r\nContent-Type", space + b"\r\nContent-Type")
    assert head != head_of(len(inner))
    with connect(plain) as connection:
        connection.sendall(head + inner)
        assert read_answer(connection)[0] == 400
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(connection)[0] == 200
    assert plain.get("/v1/sets/plain").status_code == 200
    x, body = batch(rows=2)
    head = head_of(len(body)).replace(b"\r\nContent-Type", space + b"\r\nContent-Type")
    with connect(plain) as connection:
        connection.sendall(head + body)
        status, answer, rest = read_answer(connection)
        assert (status, rest) == (200, b"")
        assert np.abs(outputs(answer) - expected(plain, x)).max() < 1e-5


def test_the_last_request_of_a_connection(plain):
    with connect(plain) as connection:
        connection.sendall(head_of(0, Connection="close"))
        assert read_answer(connection)[0] == 400
        connection.settimeout(3)
        assert connection.recv(10) == b""


def test_unread_responses_outlive_the_keep_alive_timeout(app):
    x, body = batch(rows=20_000)
    with serving(app, timeout_keep_alive=1) as url, httpx.Client(base_url=url) as client:
        upload(client, "plain", TINY / "plain")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            connection.settimeout(20)
            connection.connect((client.base_url.host, client.base_url.port))
            sent = (head_of(len(body)) + body) * 2
            threading.Thread(target=connection.sendall, args=(sent,)).start()
            time.sleep(1.8)
            rest = b""
            for _ in range(2):
                status, answer, rest = read_answer(connection, rest)
                assert status == 200
                assert outputs(answer).shape == (len(x), 128)


def test_an_idle_connection_is_closed_after_any_request(app):
    _, body = batch(rows=2)
    with serving(app, timeout_keep_alive=1) as url, httpx.Client(base_url=url) as client:
        upload(client, "plain", TINY / "plain")
        for _ in range(2):  # the second is planned from its first request on
            with connect(client) as connection:
                connection.sendall(head_of(len(body)) + body)
                assert read_answer(connection)[0] == 200
                connection.settimeout(4)
                assert connection.recv(10) == b""


def test_hundreds_of_errors_do_not_block_other_connections(app, plain):
    """One look at the socket brings a thousand requests; not all are answered in one step."""
    steps = []
    real = LaneProtocol.data_received

    def data_received(self, data):
        steps.append(len(data))
        real(self, data)

    sent = head_of(0, "/v1/sets/none/apply") * 400
    with pytest.MonkeyPatch.context() as patch, connect(plain) as connection:
        patch.setattr(LaneProtocol, "data_received", data_received)
        connection.sendall(sent)
        rest = b""
        for _ in range(400):
            status, _, rest = read_answer(connection, rest)
            assert status == 404
        assert rest == b""
    assert steps.count(0) > 10  # kept bytes are processed in steps of their own


def test_each_body_has_its_own_stall_timeout(settings):
    """What watched one body does not judge the next."""
    _, body = batch(rows=2000)
    first, second = body[:100_000], body[100_000:300_000]
    app = create_app(settings.model_copy(update={"stall_seconds": 0.8}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        upload(client, "plain", TINY / "plain")
        with connect(client) as connection:
            for pauses in ((0.3, 0.6), (0.5, 0.6)):
                connection.sendall(head_of(len(body)) + first)
                time.sleep(pauses[0])
                connection.sendall(second)
                time.sleep(pauses[1])
                connection.sendall(body[300_000:])
                assert read_answer(connection)[0] == 200


def feed(protocol, data):
    """Pass received bytes to a connection, as an event loop does."""
    while data:
        target = protocol.get_buffer(-1)
        size = min(len(target), len(data))
        target[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]


def test_a_body_and_the_next_request_in_one_read(app, client):
    """The second request has started when the first reads its body."""
    upload(client, "plain", TINY / "plain")
    x, body = batch()
    right = expected(client, x)
    short = json.dumps({"inputs": [0.5] * 64}).encode()
    following = head_of(len(short)).replace(b"vnd.safetensors", b"json")

    async def talk():
        config = uvicorn.Config(app, http=LaneConnection, log_config=None, proxy_headers=False)
        config.load()
        transport = Transport()
        protocol = LaneConnection(config, ServerState(), {})
        protocol.connection_made(transport)
        feed(protocol, head_of(len(body)) + body + following + short[:10])
        deadline = time.monotonic() + 20
        while len(transport.written) < 4 * 128 * ROWS:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        feed(protocol, short[10:])
        while transport.written.count(b"HTTP/1.1 200") < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        protocol.connection_lost(None)
        return transport.written

    first = asyncio.run(talk()).partition(b"\r\n\r\n")[2]
    length = 8 + int.from_bytes(first[:8], "little") + 4 * 128 * ROWS
    got = outputs(first[:length])
    assert np.abs(got[:300] - right).max() < 1e-5


def test_a_body_that_stalls_as_it_begins_keeps_its_first_error():
    """The refusal of its place comes after the stall, and must not break the connection."""

    async def begin():
        connection = LaneConnection.__new__(LaneConnection)
        connection._complete = asyncio.get_running_loop().create_future()
        connection._complete.set_exception(Pace(1.0, bool).too_slow())
        connection._begin, connection._filled = refuse, LONG_BYTES
        connection._check_begun()
        await connection._complete

    def refuse():
        raise BusyError("full")

    with pytest.raises(StalledError):
        asyncio.run(begin())


def test_few_of_many_short_chunks_are_parsed_at_once(settings, monkeypatch):
    """The parser reports each: 256 KiB of them would hold the event loop for 0.2 s."""
    sizes, parse = [], LaneProtocol.data_received
    monkeypatch.setattr(
        LaneProtocol,
        "data_received",
        lambda self, data: sizes.append(len(data)) or parse(self, data),
    )
    head = b"POST /v1/sets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200_000
    with (
        serving(create_app(settings)) as url,
        httpx.Client(base_url=url) as client,
        connect(client) as connection,
    ):
        connection.sendall(chunks + b"2\r\n{}\r\n0\r\n\r\n")
        connection.settimeout(30)
        assert read_answer(connection)[0] == 422
    assert sum(sizes) > 1_000_000
    assert max(sizes[1:]) <= 1 << 14
