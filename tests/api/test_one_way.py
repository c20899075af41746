"""The fast lane, FastAPI with the guarded protocol, and a plain ASGI server respond the same."""

import contextlib
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import TINY, assert_problem, connect, read_answer, serving, upload
from test_apply import Q_PROJ
from uvicorn.protocols.http.h11_impl import H11Protocol

from bonsai_lora.api.app import create_app
from bonsai_lora.api.connection import MAX_HEAD_BYTES, MAX_HEAD_LINES, GuardedProtocol
from bonsai_lora.formats import safetensors

BINARY = {"Content-Type": "application/vnd.safetensors"}
JSON = {"Content-Type": "application/json"}
K_PROJ = Q_PROJ.replace("q_proj", "k_proj")
ONE = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
MANY = "/v1/sets/plain/apply"
INFER = "/v2/models/plain/infer"


@pytest.fixture
def clients(settings):
    """One application served by the fast lane, by the guarded protocol, and by h11."""
    app = create_app(settings)
    with contextlib.ExitStack() as stack:
        made = []
        for http in (None, GuardedProtocol, H11Protocol):
            url = stack.enter_context(serving(app, http=http))
            made.append(stack.enter_context(httpx.Client(base_url=url, timeout=30)))
        upload(made[0], "plain", TINY / "plain")
        upload(made[0], "dora", TINY / "dora")
        yield made


def batch(rows=3, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)


def body_of(x, **tensors):
    return safetensors.encode({"inputs": x, **tensors})


def infer_body(x, name=Q_PROJ, **fields):
    tensor = {"name": name, "shape": list(x.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}, **fields}
    head = json.dumps(asked).encode()
    return head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def infer_json(x, name=Q_PROJ, **fields):
    tensor = {"name": name, "shape": list(x.shape), "datatype": "FP32", "data": x.tolist()}
    return json.dumps({"inputs": [tensor], **fields})


def corpus():
    """Requests of every kind to the routes of the fast lane: path, body, headers."""
    x = batch()
    text = json.dumps({"inputs": x.tolist()})
    nan = x.copy()
    nan[2, 5] = np.nan
    binary = body_of(x)
    infer, length = infer_body(x)
    shared, shared_length = infer_body(x, "x", outputs=[{"name": Q_PROJ}, {"name": K_PROJ}])
    mixed = json.dumps({"module": Q_PROJ, "sets": ["plain", None, "plain"], "inputs": x.tolist()})
    yield from [
        (ONE, binary, BINARY),
        (ONE, text, JSON),
        (ONE, text, {}),
        (f"{ONE}?scale=-2&dtype=F16", binary, BINARY),
        (f"{ONE}?dtype=BF16", text, JSON | {"Accept": "application/vnd.safetensors"}),
        (ONE, binary, BINARY | {"Accept": "application/json"}),
        (ONE, body_of(x[:0]), BINARY),
        (ONE, body_of(x[0]), BINARY),
        (ONE, body_of(batch(3000)), BINARY),
        (MANY, safetensors.encode({Q_PROJ: x, K_PROJ: x[:1]}), BINARY),
        (f"{MANY}?module={Q_PROJ}&module={K_PROJ}", binary, BINARY),
        (MANY, json.dumps({"inputs": {K_PROJ: x.tolist()}, "sets": ["plain"]}), JSON),
        ("/v1/apply", mixed, JSON),
        (INFER, infer, length),
        (INFER, shared, shared_length),
        (f"{INFER}?unknown=1", infer_json(x, id="7"), JSON),
        (INFER, infer_json(x), JSON | {"Accept-Encoding": "gzip"}),
        (INFER.replace("/infer", "/versions/1/infer"), infer_json(x), JSON),
        # What is refused.
        (ONE, body_of(nan), BINARY),
        (ONE, body_of(batch().astype(np.float64)[:, :5].astype(np.float32)), BINARY),
        (ONE, binary[:-4], BINARY),
        (ONE, binary, JSON),
        (ONE, text, BINARY),
        (ONE, binary, {"Content-Type": "text/plain"}),
        (ONE, binary, BINARY | {"Accept": "text/html"}),
        (ONE, binary, BINARY | {"Content-Encoding": "gzip"}),
        (f"{ONE}?scale=x", binary, BINARY),
        (f"{ONE}?unknown=1", binary, BINARY),
        (f"{ONE}?dtype=F64", binary, BINARY),
        (f"{ONE}?dtype=F16", text, JSON),
        (ONE.replace(Q_PROJ, "nothing"), binary, BINARY),
        (ONE.replace("plain", "nobody"), binary, BINARY),
        (ONE.replace("plain", "dora"), binary, BINARY),
        (ONE, b"", JSON),
        (ONE, b"{}", JSON),
        (ONE, text[:-1] + ', "more": 1}', JSON),
        (MANY, text, JSON),
        ("/v1/apply", mixed.replace('"plain"', '"nobody"'), JSON),
        (INFER, infer_json(x, "nothing"), JSON),
        (INFER, infer, length | {"Inference-Header-Content-Length": "x"}),
        (INFER, infer, length | {"Inference-Header-Content-Length": "100000"}),
        (INFER.replace("/infer", "/versions/2/infer"), infer_json(x), JSON),
        (INFER.replace("plain", "nobody"), infer_json(x), JSON),
        (ONE.replace("apply", "nowhere"), binary, BINARY),
        ("/v1/sets//apply", binary, BINARY),
        (ONE.replace("/v1/", "/v1//"), binary, BINARY),
        (ONE.replace("plain", "pl%61in"), binary, BINARY),
        (f"{ONE}/", binary, BINARY),
    ]


VARIABLE = {"date", "x-request-id", "server", "connection"}


def seen(answer):
    """All of an answer that must not depend on how it was given."""
    headers = {name: one for name, one in answer.headers.items() if name not in VARIABLE}
    content = answer.content
    if b'"request_id"' in content:
        content = re.sub(rb'"request_id":"[0-9a-f]+"', b"", content)
        headers.pop("content-length")
    return answer.status_code, headers, content


def test_every_kind_of_request_has_the_same_response(clients):
    statuses = set()
    for path, body, headers in corpus():
        first, *others = (seen(one.post(path, content=body, headers=headers)) for one in clients)
        for other in others:
            assert other == first, path
        statuses.add(first[0])
    assert statuses == {200, 400, 404, 406, 415, 422}


def test_random_requests_have_the_same_response(clients):
    """Bytes, paths and headers of good requests, changed at random."""
    numbers = random.Random(7)
    requests = list(corpus())
    for _ in range(700):
        path, body, headers = numbers.choice(requests)
        body = bytearray(body if isinstance(body, bytes) else body.encode())[:5000]
        for _ in range(numbers.randrange(3)):
            if body:
                place = numbers.randrange(len(body))
                body[place : place + numbers.randrange(3)] = numbers.randbytes(numbers.randrange(4))
        if numbers.random() < 0.3:
            place = numbers.randrange(1, len(path))
            path = path[:place] + numbers.choice("/?&=%.a1 ") + path[place + 1 :]
        if numbers.random() < 0.3:
            headers = headers | numbers.choice(requests)[2]
        answers = [
            seen(one.post(path, content=bytes(body), headers=headers)) for one in clients[:2]
        ]
        assert answers[0] == answers[1], (path, bytes(body), headers)


def raw(path, body, headers=BINARY, method="POST"):
    body = body if isinstance(body, bytes) else body.encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def exchange(client, sent, count, pieces):
    """The responses to raw bytes sent in `pieces`."""
    with connect(client) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send():
            at = 0
            for size in pieces:
                connection.sendall(sent[at : at + size])
                at += size
                time.sleep(0.0005)
                if at >= len(sent):
                    return
            connection.sendall(sent[at:])

        sender = threading.Thread(target=send)
        sender.start()
        found, rest = [], b""
        for _ in range(count):
            status, answer, rest = read_answer(connection, rest)
            found.append((status, re.sub(rb'"request_id":"[0-9a-f]+"', b"", answer)))
        assert rest == b""
        sender.join()
        return found


@pytest.mark.parametrize(
    "pieces",
    [[1 << 30], itertools.repeat(7), itertools.cycle([1, 1000, 63, 4096])],
    ids=["whole", "by seven bytes", "irregular"],
)
def test_pipelined_requests_in_pieces_of_any_size(clients, pieces):
    """Some refused, some to other routes: the answers keep their order."""
    asked = [one for one in corpus() if len(one[1]) < 3000]
    random.Random(1).shuffle(asked)
    asked = asked[: 12 if isinstance(pieces, itertools.repeat) else 40]
    sent = b"".join(
        raw(*one) + (raw("/healthz", b"", {}, "GET") if number % 3 == 0 else b"")
        for number, one in enumerate(asked)
    )
    count = len(asked) + -(-len(asked) // 3)
    sizes = list(itertools.islice(pieces, 20_000))
    first, second = (exchange(one, sent, count, sizes) for one in clients[:2])
    assert first == second
    assert [status for status, _ in first].count(200) > count // 3


def test_hundreds_of_requests_at_once(clients):
    """They take turns with other connections, and the responses keep their order."""
    bodies = [body_of(batch(seed=seed)) for seed in range(3)]
    right = [clients[1].post(ONE, content=body, headers=BINARY).content for body in bodies]
    order = [number % 3 for number in range(400)]
    sent = b"".join(raw(ONE, bodies[one]) for one in order)
    found = exchange(clients[0], sent, 400, [1 << 30])
    assert found == [(200, right[one]) for one in order]


def test_an_unreadable_request_closes_the_connection_after_earlier_responses(clients):
    one = raw(ONE, body_of(batch()))
    for client in clients[:2]:
        with connect(client) as connection:
            connection.sendall(one)
            assert read_answer(connection)[0] == 200
            connection.sendall(b"nonsense\r\n\r\n")
            assert read_answer(connection)[0] == 400
            assert connection.recv(10) == b""


def test_a_client_that_disconnects_amid_many_requests(clients, capfd):
    one = raw(ONE, body_of(batch()))
    for _ in range(20):
        with connect(clients[0]) as connection:
            connection.sendall(one * 60)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert clients[0].post(ONE, content=body_of(batch()), headers=BINARY).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_requests_are_counted_and_have_ids(clients):
    for client in clients[:2]:
        client.post(ONE, content=body_of(batch()), headers=BINARY)
        answer = client.post(
            ONE, content=body_of(batch()), headers=BINARY | {"X-Request-Id": "mine"}
        )
        assert answer.headers["x-request-id"] == "mine"
        body, length = infer_body(batch(), "x", outputs=[{"name": Q_PROJ}, {"name": K_PROJ}])
        assert client.post(INFER, content=body, headers=length).status_code == 200
    text = clients[0].get("/metrics").text
    values = dict(re.findall(r"^(bonsai_lora_[^ #]+) ([\d.e+]+)$", text, re.MULTILINE))
    route = 'method="POST",route="/v1/sets/{set}/adapters/{module}/apply"'
    assert values[f'bonsai_lora_requests_total{{{route},status="200"}}'] == "4.0"
    assert values["bonsai_lora_rows_applied_total"] == "24.0"
    (counts,) = clients[0].get("/v2/models/plain/stats").json()["model_stats"]
    assert counts["inference_count"] == 6
    assert counts["execution_count"] == 2
    assert counts["inference_stats"]["success"]["count"] == 2
    assert counts["inference_stats"]["compute_infer"]["ns"] > 0


def test_a_changed_set_is_visible_immediately(clients):
    for version, folder in enumerate(("rslora-patterns", "plain"), 2):
        upload(clients[0], "plain", TINY / folder)
        for client in clients:
            assert client.post(ONE, json={"inputs": batch().tolist()}).json()["version"] == version
    clients[0].delete("/v1/sets/plain")
    for client in clients:
        answer = client.post(ONE, content=body_of(batch()), headers=BINARY)
        assert_problem(answer, 404, "set_not_found")


@pytest.mark.parametrize("served", [0, 1], ids=["fast lane", "framework"])
class TestHeads:
    """Limits of a request head, with each parser."""

    def lines(self, count, size=10):
        return {f"X-{number}": "v" * size for number in range(count)}

    @pytest.mark.parametrize("path", [ONE, "/healthz"])
    def test_limit_of_header_lines(self, clients, served, path):
        body = body_of(batch())
        most = MAX_HEAD_LINES - 3  # Host, Content-Length, Content-Type
        for count, wanted in ((most, {200, 405}), (most + 1, {431})):
            with connect(clients[served]) as connection:
                connection.sendall(raw(path, body, BINARY | self.lines(count)))
                status, answer, _ = read_answer(connection)
                assert status in wanted
                if status == 431:
                    problem = json.loads(answer)
                    assert problem["code"] == "head_too_large"
                    assert problem["limit_lines"] == MAX_HEAD_LINES
                    assert connection.recv(10) == b""

    def test_limit_of_head_bytes(self, clients, served):
        for size, wanted in ((MAX_HEAD_BYTES - 300, 200), (MAX_HEAD_BYTES, 431)):
            with connect(clients[served]) as connection:
                connection.sendall(raw(ONE, body_of(batch()), BINARY | {"X-Long": "v" * size}))
                assert read_answer(connection)[0] == wanted

    def test_an_endless_header_line_is_not_buffered(self, clients, served):
        with connect(clients[served]) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
            began = time.monotonic()
            with contextlib.suppress(OSError):  # it ends a second after the refusal
                while time.monotonic() - began < 10:
                    connection.sendall(b"v" * (1 << 16))
                    time.sleep(0.02)
                pytest.fail("the connection goes on")
        assert clients[served].get("/healthz").status_code == 200

    def test_each_head_on_a_connection_has_its_own_limits(self, clients, served):
        body = body_of(batch(800))
        with connect(clients[served]) as connection:
            connection.sendall(
                raw(ONE, body) + b"GET /healthz HTTP/1.1\r\nX-Long: " + b"v" * 30_000
            )
            assert read_answer(connection)[0] == 200
            connection.sendall(b"\r\nHost: localhost\r\n\r\n")
            assert read_answer(connection)[0] == 200

    def test_431_follows_the_responses_to_earlier_requests(self, clients, served):
        body = body_of(batch(3000))
        with connect(clients[served]) as connection:
            large = raw("/healthz", b"", {"X-Long": "v" * 100_000}, "GET")
            threading.Thread(target=connection.sendall, args=(raw(ONE, body) + large,)).start()
            assert read_answer(connection)[0] == 200


def test_a_short_body_that_never_arrives(settings):
    app = create_app(settings.model_copy(update={"stall_seconds": 0.3}))
    for http in (None, GuardedProtocol, H11Protocol):
        with serving(app, http=http) as url, httpx.Client(base_url=url) as client:
            upload(client, "plain", TINY / "plain")
            with connect(client) as connection:
                connection.sendall(raw(ONE, bytes(500))[:-490])
                status, answer, _ = read_answer(connection)
                assert (status, json.loads(answer)["code"]) == (408, "stalled")
                assert connection.recv(10) == b""


def test_a_client_that_does_not_read_is_disconnected(settings):
    app = create_app(settings.model_copy(update={"stall_seconds": 0.5}))
    body = body_of(batch(20_000))
    for http in (None, GuardedProtocol):
        with serving(app, http=http) as url, httpx.Client(base_url=url) as client:
            upload(client, "plain", TINY / "plain")
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
                connection.settimeout(20)
                connection.connect((client.base_url.host, client.base_url.port))
                connection.sendall(raw(ONE, body))
                time.sleep(2)
                got = 0
                with contextlib.suppress(ConnectionResetError):
                    while part := connection.recv(1 << 16):
                        got += len(part)
                assert got < 20_000 * 128 * 4


def test_the_body_of_a_refused_request_is_skipped(clients):
    """Its bytes are not parsed as the next request."""
    for client in clients[:2]:
        with connect(client) as connection:
            refused = b"POST /v1/" * (1 << 15)
            connection.sendall(raw(ONE.replace(Q_PROJ, "nothing"), refused))
            assert read_answer(connection)[0] == 404
            connection.sendall(raw(ONE, body_of(batch())))
            assert read_answer(connection)[0] == 200


def test_an_error_instead_of_100_continue_closes_the_connection(clients):
    """The client may or may not send the body."""
    with connect(clients[0]) as connection:
        size = 1 << 17
        head = raw(ONE.replace(Q_PROJ, "nothing"), bytes(size), {"Expect": "100-continue"})[:-size]
        connection.sendall(head)
        assert read_answer(connection)[0] == 404
        assert connection.recv(10) == b""


@pytest.mark.parametrize(("rank", "width"), [(0, 4), (1, 1)])
def test_empty_factors_do_not_hide_non_finite_inputs(clients, rank, width):
    """An A with no numbers, or the one number 0."""
    client = clients[0]
    client.post("/v1/sets", json={"name": "s"})
    path = "/v1/sets/s/adapters/m"
    factors = {
        "lora_A": np.zeros((rank, width), np.float32),
        "lora_B": np.ones((3, rank), np.float32),
    }
    assert client.put(path, content=safetensors.encode(factors), headers=BINARY).status_code == 201
    x = np.ones((3, width), np.float32)
    bad = x.copy()
    bad[1, 0] = np.nan
    for client in clients:
        answer = client.post(f"{path}/apply", content=body_of(bad), headers=BINARY)
        assert_problem(answer, 422, "non_finite_input")
        answer = client.post(f"{path}/apply", content=body_of(x), headers=BINARY)
        assert answer.status_code == 200
    weights = safetensors.encode({"weights": np.ones((3, width), np.float32)})
    assert client.post(f"{path}/merge", content=weights, headers=BINARY).status_code == 200


def test_another_server_keeps_the_limits(tmp_path):
    """`uvicorn bonsai_lora.api.app:create_default_app --factory`, with settings from variables."""
    variables = {"STORE": "memory:", "MAX_JSON_BYTES": "3000", "MAX_ROWS": "4"}
    variables |= {"MAX_BODY_BYTES": "4000", "MAX_ANSWER_BYTES": "1500"}
    environment = os.environ | {f"BONSAI_LORA_{name}": one for name, one in variables.items()}
    command = [sys.executable, "-m", "uvicorn", "bonsai_lora.api.app:create_default_app"]
    with (
        socket.socket() as listener,
        subprocess.Popen(
            [*command, "--factory", "--fd", str(_listen(listener)), "--log-level", "warning"],
            env=environment,
            pass_fds=[listener.fileno()],
            cwd=tmp_path,
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=60) as client:
                upload(client, "plain", TINY / "plain")
                for rows, code in ((2, None), (3, "answer_too_large"), (5, "too_many_rows")):
                    answer = client.post(ONE, content=body_of(batch(rows)), headers=BINARY)
                    if code is None:
                        assert answer.status_code == 200
                    else:
                        assert_problem(answer, 413, code)
                answer = client.post(ONE, content=body_of(batch(40)), headers=BINARY)
                assert_problem(answer, 413, "body_too_large")
                answer = client.post(ONE, json={"inputs": batch(3).tolist()})
                assert_problem(answer, 413, "body_too_large")
        finally:
            process.terminate()


def _listen(listener):
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener.fileno()


SERVED_TESTS = ("test_apply.py", "test_mixed.py", "test_stats.py")


def test_a_tree_without_the_fast_lane_passes_the_tests_that_do_not_name_it(tmp_path):
    import shutil

    root = Path(__file__).parents[2]
    ignored = shutil.ignore_patterns("fast_lane", "__pycache__")
    shutil.copytree(root / "app", tmp_path / "app", ignore=ignored)
    probe = "import bonsai_lora; print(bonsai_lora.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "app")}
    told = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True)
    assert str(tmp_path).encode() in told.stdout
    tests = [str(root / "tests" / "api" / name) for name in SERVED_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
