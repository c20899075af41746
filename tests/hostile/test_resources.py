"""What a caller can make large is counted first; long work does not delay short work."""

import contextlib
import gzip
import json
import re
import resource
import select
import socket
import threading
import time

import httpx
import numpy as np
import orjson
import pytest
from conftest import assert_problem, read_answer, serving, snapshot
from test_one_way import BINARY, JSON, connect, raw

from bonsai_lora.api.app import create_app
from bonsai_lora.api.connection import LINGER_SECONDS, GuardedProtocol
from bonsai_lora.api.routes import hub
from bonsai_lora.formats import safetensors
from bonsai_lora.service import work
from bonsai_lora.storage import files as store_module

RAW = {"Content-Type": "application/octet-stream"}
APPLY = "/v1/sets/s/adapters/m/apply"
NARROW, WIDE = 8, 100_000
BUDGET = 64 << 20
STALL = 0.5
MIB = 1 << 20


LANES = {"params": [None, GuardedProtocol], "ids": ["fast lane", "framework"]}


@pytest.fixture(**LANES)
def service(request, settings):
    """A client and the app; the set `s` has the module m, (8 -> 100000), of rank 1."""
    with serving_with(settings, request.param, STALL) as found:
        yield found


@pytest.fixture(**LANES)
def patient(request, settings):
    """The same with a long stall timeout."""
    with serving_with(settings, request.param, 60) as found:
        yield found


@contextlib.contextmanager
def serving_with(settings, http, stall_seconds):
    changes = {"work_memory_bytes": BUDGET, "max_concurrency": 8, "stall_seconds": stall_seconds}
    app = create_app(settings.model_copy(update=changes))
    with (
        serving(app, http=http) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
        client.put("/v1/sets/s/adapters/m", json={"d_in": NARROW, "d_out": WIDE})
        yield client, app


def rows(count, width=NARROW):
    return safetensors.encode({"inputs": np.ones((count, width), np.float32)})


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held(app):
    context = app.state.context
    return context.short.in_progress, context.long.in_progress, context.memory.reserved_bytes


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


HUGE = {"hidden_size": 5_000_000, "intermediate_size": 5_000_000}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/sets", {"name": "n", "config": {"rank": 1024}, "mlp": HUGE}),
        (
            "PUT",
            "/v1/sets/s/adapters/n",
            {"d_in": 5_000_000, "d_out": 5_000_000, "config": {"rank": 1000}},
        ),
    ],
)
def test_matrices_are_counted_before_they_are_drawn(service, method, path, body):
    client, app = service
    before, files = peak_bytes(), snapshot(app.state.store)
    assert_problem(client.request(method, path, json=body), 507, "memory_budget_exceeded")
    assert peak_bytes() - before < 64 * MIB
    assert snapshot(app.state.store) == files
    wait_until(lambda: held(app) == (0, 0, 0))


def test_what_does_not_fit_now_is_refused_and_fits_later(service):
    client, app = service
    size = {"hidden_size": 2000, "intermediate_size": 2000}
    body = {"name": "n", "config": {"rank": 64}, "mlp": size}
    app.state.context.memory.reserve(BUDGET - MIB)
    busy = client.post("/v1/sets", json=body)
    assert_problem(busy, 503, "busy")
    assert "retry-after" in busy.headers
    app.state.context.memory.release(BUDGET - MIB)
    assert client.post("/v1/sets", json=body).status_code == 201
    wait_until(lambda: held(app) == (0, 0, 0))


@pytest.mark.parametrize("modules", [9, 10])
def test_modules_of_a_set(settings, modules):
    """At the limit and above it, whichever way they come."""
    app = create_app(settings.model_copy(update={"max_modules": 9}))
    size = {"hidden_size": 4, "intermediate_size": 4}
    with serving(app) as url, httpx.Client(base_url=url) as client:
        new = {"name": "n", "mlp": size, "num_layers": 3}
        assert client.post("/v1/sets", json=new).status_code == 201
        for extra in range(modules - 9):
            answer = client.put(f"/v1/sets/n/adapters/m{extra}", json={"d_in": 4, "d_out": 4})
            assert_problem(answer, 422, "too_many_modules")
        large = {**new, "name": "large", "num_layers": 4}
        assert_problem(client.post("/v1/sets", json=large), 422, "too_many_modules")
        # Replacing a module adds none.
        same = client.put(
            "/v1/sets/n/adapters/model.layers.0.mlp.up_proj", json={"d_in": 4, "d_out": 4}
        )
        assert same.status_code == 200


MANY = 1 << 20
EMPTY = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def header_only(text):
    return len(text).to_bytes(8, "little") + text.encode()


COUNTED = {
    "lists": (
        "/v1/sets/s/apply",
        JSON,
        '{"inputs":{' + ",".join(f'"{n}":[1]' for n in range(MANY // 2)) + "}}",
    ),
    "batches": (
        "/v1/sets/s/apply",
        JSON,
        '{"inputs":{' + ",".join(f'"{n}":[1]' for n in range(40_000)) + "}}",
    ),
    "strings": (
        "/v1/apply",
        JSON,
        '{"module":"m","inputs":[[1]],"sets":[' + '"",' * MANY + "null]}",
    ),
    "outputs": (
        "/v2/models/s/infer",
        JSON,
        '{"inputs":[],"outputs":[' + '{"name":"m"},' * MANY + "{}]}",
    ),
    "tensors": (
        "/v1/sets/s/apply",
        BINARY,
        header_only("{" + ",".join(EMPTY % n for n in range(70_000)) + "}"),
    ),
    "tensors of a module": (
        "/v1/sets/s/adapters/m/merge",
        BINARY,
        header_only("{" + ",".join(EMPTY % n for n in range(10_000)) + "}"),
    ),
    "nulls in metadata": (
        "/v1/apply",
        BINARY,
        safetensors.encode(
            {"inputs": np.ones((1, NARROW), np.float32)},
            {"module": "m", "sets": "[" + "null," * (MANY + 1) + "null]"},
        ),
    ),
    "lists in metadata": (
        "/v1/apply",
        BINARY,
        safetensors.encode(
            {"inputs": np.ones((1, NARROW), np.float32)}, {"module": "m", "sets": "[],[" * MANY}
        ),
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_values_are_counted_before_they_are_parsed(service, name):
    client, app = service
    path, headers, body = COUNTED[name]
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code in (400, 413, 422)
    assert re.search(r"has \d{5,} \w+|more than", answer.text), answer.text[:500]
    wait_until(lambda: held(app) == (0, 0, 0))


LISTED = [
    ("POST", "/v1/sets", {"name": "n", "config": {"target_modules": [0] * 100_000}}),
    ("POST", "/v1/combine", {"name": "n", "sets": [0] * 100_000, "method": "cat"}),
]


@pytest.mark.parametrize(("method", "path", "body"), LISTED)
def test_long_lists_of_wrong_values_are_refused_before_each_is_reported(
    service, method, path, body
):
    client, app = service
    files = snapshot(app.state.store)
    answer = client.request(method, path, json=body)
    assert_problem(answer, 422, "invalid_request")
    assert "commas" in answer.json()["detail"]
    assert len(answer.content) < 1000
    assert snapshot(app.state.store) == files


def test_uploads_with_too_many_values_or_names_are_refused_before_they_are_parsed(service):
    client, app = service
    files = snapshot(app.state.store)
    weights = {"a": np.ones((1, 1), np.float32)}
    config = {"peft_type": "LORA", "r": 1, "rank_pattern": {}, "target_modules": [""] * 70_000}
    parts = {"adapter_config": json.dumps(config), "adapter_model": safetensors.encode(weights)}
    assert_problem(client.put("/v1/sets/n", files=parts), 422, "invalid_adapter")
    parts["adapter_config"] = json.dumps({**config, "target_modules": ["a"]})
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    most = 8 * app.state.context.limits.max_modules
    header = "{" + ",".join(entry % number for number in range(most + 1)) + "}"
    parts["adapter_model"] = len(header).to_bytes(8, "little") + header.encode()
    answer = client.put("/v1/sets/n", files=parts)
    assert_problem(answer, 422, "too_many_modules")
    assert answer.json()["got"] == most + 1
    assert snapshot(app.state.store) == files


def test_a_long_header_of_an_apply_is_parsed_in_the_long_lane(service):
    client, app = service
    context, release = app.state.context, threading.Event()
    tensors = {"inputs": np.ones((1, NARROW), np.float32)}
    body = safetensors.encode(tensors, {"sets": '["s"]', "padding": "x" * 100_000})
    with contextlib.ExitStack() as stack:
        stack.callback(release.set)
        for _ in range(context.settings.threads + 3):
            context.long._threads.submit(release.wait, 20)
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(client.post(APPLY, content=body, headers=BINARY))
        )
        waiting.start()
        wait_until(lambda: context.long.waiting == 1)
        with httpx.Client(base_url=client.base_url, timeout=10) as other:
            assert other.post(APPLY, content=rows(1), headers=BINARY).status_code == 200
        release.set()
        waiting.join(10)
    assert answers[0].status_code == 200


def test_applies_are_answered_while_all_long_threads_work(service):
    client, app = service
    context, release = app.state.context, threading.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(release.set)
        for _ in range(context.settings.threads + 3):
            context.long._threads.submit(release.wait, 20)
        waiting = threading.Thread(
            target=lambda: client.post("/v1/sets", json={"name": "later"}), daemon=True
        )
        waiting.start()
        wait_until(lambda: context.long.waiting == 1)
        with httpx.Client(base_url=client.base_url, timeout=10) as other:
            headers = BINARY
            # One that is computed at once, and one in a thread.
            for count in (1, 100):
                answer = other.post(APPLY, content=rows(count), headers=headers)
                assert answer.status_code == 200
            assert other.get("/healthz").status_code == 200
            assert other.get("/v1/sets/s").status_code == 200
            assert other.get("/v1/sets/later").status_code == 404
        release.set()
        waiting.join(10)
    assert client.get("/v1/sets/later").status_code == 200


MERGE = "/v1/sets/s/adapters/m/merge?dtype=F32"
SLOW = {
    "body of an apply": ("/v1/sets/s/adapters/n/apply", BINARY, rows(4000)),
    "body of a merge": (MERGE, RAW, bytes(4 * NARROW * WIDE)),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_do_not_keep_others_from_the_lanes(patient, name, monkeypatch):
    """They give up their places after some time, and are served to the end nevertheless."""
    monkeypatch.setattr(work, "_LATE_SECONDS", 0.3)
    client, app = patient
    client.put("/v1/sets/s/adapters/n", json={"d_in": NARROW, "d_out": NARROW})
    path, headers, body = SLOW[name]
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(client)) for _ in range(8)]
        for one in slow:
            one.sendall(raw(path, body, headers)[: -len(body) // 3])
        wait_until(lambda: 8 in held(app)[:2])
        with httpx.Client(base_url=client.base_url, timeout=10) as other:
            wait_until(lambda: other.post(path, content=body, headers=headers).status_code == 200)
        for one in slow:
            one.sendall(body[-len(body) // 3 :])
            assert read_answer(one)[0] == 200
    wait_until(lambda: held(app) == (0, 0, 0))


def test_while_others_are_refused_because_of_slow_clients_more_is_asked_of_them(service):
    client, app = service
    body = rows(20_000)
    with connect(client) as connection:
        connection.sendall(raw(APPLY, body, BINARY)[: -len(body) // 2])
        wait_until(lambda: held(app)[0] == 1)
        began, sent = time.monotonic(), 0
        app.state.context.memory.crowded_at = began + 60
        connection.settimeout(STALL / 10)
        while time.monotonic() - began < 20 * STALL:
            connection.sendall(bytes(1000))  # 20 KB a second
            sent += 1000
            with contextlib.suppress(TimeoutError):
                assert connection.recv(12) == b"HTTP/1.1 408"
                break
        assert time.monotonic() - began < 10 * STALL
        assert sent > 1024 * STALL
    wait_until(lambda: held(app) == (0, 0, 0))


def test_a_short_body_has_no_place_before_it_is_complete(service):
    client, app = service
    body = rows(1)
    with connect(client) as connection:
        connection.sendall(raw(APPLY, body)[:-4])
        time.sleep(STALL / 4)
        wait_until(lambda: held(app) == (0, 0, 0))
        connection.sendall(body[-4:])
        assert read_answer(connection)[0] == 200


def test_a_long_body_is_counted_when_it_has_begun(service):
    """Not by its head alone, which costs its sender nothing."""
    client, app = service
    body = rows(30_000)
    sent = raw(APPLY, body)
    with connect(client) as connection:
        connection.sendall(sent[: -len(body)])
        time.sleep(STALL / 4)
        assert held(app) == (0, 0, 0)
        connection.sendall(sent[-len(body) : -len(body) // 2])
        wait_until(lambda: held(app) == (1, 0, 2 * len(body)))
    wait_until(lambda: held(app) == (0, 0, 0))


def test_answers_that_nobody_reads_are_bounded(service):
    """Each is 32 MB of float32, and the budget 64 MiB: the third waits for somebody to read."""
    client, app = service
    asked = raw(APPLY, rows(80))
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(2):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect((client.base_url.host, client.base_url.port))
            one.sendall(asked)
            silent.append(one)
        for one in silent:
            one.settimeout(20)
            assert one.recv(1)  # the rest stays unread
        wait_until(lambda: held(app)[2] > BUDGET // 2)
        headers = BINARY
        assert_problem(client.post(APPLY, content=rows(80), headers=headers), 503, "busy")
        assert client.post(APPLY, content=rows(1), headers=headers).status_code == 200
        # A client that reads frees them; one that does not is disconnected.
        wait_until(lambda: held(app) == (0, 0, 0), 20 * STALL)
    assert client.post(APPLY, content=rows(80), headers=headers).status_code == 200


def test_a_body_slower_than_the_pace_ends(service):
    """It moves within every stall timeout, but 20 bytes instead of 512."""
    client, app = service
    body = rows(30_000)
    with connect(client) as connection:
        connection.sendall(raw(APPLY, body)[: -len(body)])
        connection.settimeout(STALL / 4)
        began, answer = time.monotonic(), b""
        while not answer and time.monotonic() - began < 10 * STALL:
            connection.sendall(b"x" * 5)
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 408 "), answer
    wait_until(lambda: held(app) == (0, 0, 0))


def test_an_answer_read_slower_than_the_pace_ends(service):
    client, app = service
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((client.base_url.host, client.base_url.port))
        connection.sendall(raw(APPLY, rows(80)))
        wait_until(lambda: held(app)[0] == 1)
        began = time.monotonic()
        while held(app)[0] and time.monotonic() - began < 20 * STALL:
            connection.recv(10)
            time.sleep(STALL / 4)
        wait_until(lambda: held(app) == (0, 0, 0))


@pytest.mark.parametrize("status", [413, 503])
def test_a_client_that_only_sends_sees_its_refusal(service, status):
    """It reads after everything is sent, as many do; the connection ends within two seconds."""
    client, app = service
    length = 65 * MIB if status == 413 else 4 * MIB
    context = app.state.context
    with contextlib.ExitStack() as stack:
        for _ in range(8 if status == 503 else 0):
            stack.enter_context(context.short.admit())
        connection = stack.enter_context(connect(client))
        connection.sendall(raw(APPLY, bytes(length))[:-length])
        sent = bytes(64 << 10)
        began = time.monotonic()
        select.select([connection], [], [], 10)  # the refusal is there
        count = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(2 * MIB // len(sent)):
                connection.sendall(sent)
                count += len(sent)
        assert count >= MIB // 2  # no reset, which could overtake the refusal
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(1 << 16)
        assert int(answer.split()[1]) == status
        assert b"connection: close" in answer.lower()
        with contextlib.suppress(ConnectionError):
            while connection.recv(1 << 16):
                pass
        assert time.monotonic() - began < 2 + LINGER_SECONDS
    wait_until(lambda: held(app) == (0, 0, 0))


def test_compressed_bodies_are_counted_as_what_they_become(service):
    client, app = service
    bomb = gzip.compress(bytes(60 * MIB))
    headers = {"Content-Encoding": "gzip", "Inference-Header-Content-Length": "0"}
    app.state.context.memory.reserve(BUDGET // 2)
    answer = client.post("/v2/models/s/infer", content=bomb, headers=headers)
    app.state.context.memory.release(BUDGET // 2)
    assert answer.status_code == 503
    wait_until(lambda: held(app) == (0, 0, 0))


def many(text, size):
    return ",".join([text] * (size // (len(text) + 1)))


SLOW_JSON = {
    "empty lists": (many("[]", 4 * MIB), 422),
    "lists in lists": (many("[[1]]", 8 * MIB), 422),
    "objects": (many("{}", 4 * MIB), 422),
    "one odd number": (many("1", MIB) + ", null", 422),
    "strings": (many('"1"', MIB), 422),
    "22 digits": (many("0.1234567890123456789012", MIB), 422),
    "not JSON": (many("1", MIB) + "]", 400),
    "NaN": (many("1", MIB) + ", NaN", 422),
}
"""What a list has in it, and the status of its refusal."""


@pytest.mark.parametrize("name", SLOW_JSON)
def test_json_that_is_slow_to_read_is_not_read_on_the_event_loop(service, name, monkeypatch):
    client, app = service
    inside, status = SLOW_JSON[name]
    text = f'{{"inputs": [{inside}]}}'
    threads = set()

    def loads(body, _loads=orjson.loads):
        if len(body) > MIB // 2:
            threads.add(threading.current_thread().name)
        return _loads(body)

    monkeypatch.setattr(orjson, "loads", loads)
    for path in (APPLY, "/v1/apply", "/v1/sets/s/apply"):
        answer = client.post(path, content=text, headers=JSON)
        assert answer.status_code == status, answer.text
        is_counted = "lists and objects, but the limit is" in answer.text
        assert is_counted == (name in ("empty lists", "lists in lists", "objects"))
    assert all(one.startswith("long") for one in threads), threads
    wait_until(lambda: held(app) == (0, 0, 0))


def test_uploads_count_against_the_spill_budget_as_they_come(service):
    """Not from their heads on, which cost nothing to send."""
    client, app = service
    spill = app.state.context.spill
    begun = b'--x\r\nContent-Disposition: form-data; name="adapter_config"\r\n\r\n' + bytes(1000)
    with connect(client) as connection:
        head = "PUT /v1/sets/u HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x"
        connection.sendall(f"{head}\r\nContent-Length: {3 * MIB}\r\n\r\n".encode())
        time.sleep(STALL / 4)
        assert spill.reserved_bytes == 0
        connection.sendall(begun)
        wait_until(lambda: spill.reserved_bytes == len(begun))
        free = spill.total_bytes - spill.reserved_bytes
        spill.reserve(free)
        files = {"adapter_config": json.dumps({}), "adapter_model": b""}
        assert_problem(client.put("/v1/sets/v", files=files), 503, "busy")
        spill.release(free)
    wait_until(lambda: spill.reserved_bytes == 0)


def test_a_set_with_a_long_header_is_opened_and_described_in_a_thread(service, monkeypatch):
    """1,200 modules: 100 kB of header. A small set is opened at once."""
    client, app = service
    size = {"hidden_size": 64, "intermediate_size": 64}
    large = {"name": "large", "config": {"rank": 4}, "mlp": size, "num_layers": 400}
    assert client.post("/v1/sets", json=large).status_code == 201
    small = {"name": "small", "config": {"rank": 1}, "mlp": {**size}}
    assert client.post("/v1/sets", json=small).status_code == 201
    context, threads = app.state.context, {"large": set(), "small": set()}
    monkeypatch.setattr(
        store_module,
        "open_set_file",
        lambda path, _open=store_module.open_set_file: (
            threads[path.stem].add(threading.current_thread().name) or _open(path)
        ),
    )
    for name, modules in (("large", 1200), ("small", 3)):
        for path in ("", "/adapters"):
            context.store.release(name)
            answer = client.get(f"/v1/sets/{name}{path}")
            assert len(answer.json()["modules" if not path else "adapters"]) == modules
            assert answer.headers["content-type"] == "application/json"
    assert threads["large"]
    assert all(one.startswith("long") for one in threads["large"])
    assert not any(one.startswith("long") for one in threads["small"])


@pytest.mark.parametrize(
    ("method", "path", "media"),
    [
        ("POST", "/v1/sets", "application/json"),
        ("POST", "/v1/combine", "application/json"),
        ("PATCH", "/v1/sets/s", "application/json"),
        ("PUT", "/v1/sets/u", "multipart/form-data; boundary=x"),
        ("PUT", "/v1/sets/s/adapters/n", "application/json"),
        ("POST", "/v1/sets/s/adapters/m/merge", "application/json"),
    ],
)
@pytest.mark.parametrize("framing", ["Content-Length: 900000", "Transfer-Encoding: chunked"])
def test_bodies_that_never_come_take_no_place(service, method, path, media, framing):
    client, app = service
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media}\r\n{framing}"
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(client)) for _ in range(9)]
        for one in connections:
            one.sendall(f"{head}\r\n\r\n".encode())
        answer = client.post("/v1/sets", json={"name": "later", "config": {"rank": 1}})
        assert answer.status_code == 201, answer.text
        assert held(app)[1] == 0
        for one in connections:
            assert read_answer(one)[0] == 408
    wait_until(lambda: held(app) == (0, 0, 0))


def test_unknown_fields_are_counted_before_they_are_reported(service):
    """Pydantic took 2 s for these, in which no other thread ran."""
    client, _ = service
    many = ",".join(f'"a{number}":1' for number in range(300_000))
    text = f'{{"d_in": 8, "d_out": 8, "config": {{{many}}}}}'
    began = time.process_time()
    answer = client.put("/v1/sets/s/adapters/n", content=text, headers=JSON)
    assert_problem(answer, 422, "invalid_request")
    assert "300003 fields" in answer.json()["detail"]
    assert time.process_time() - began < 0.7


def test_forms_of_a_hub_client_are_read_in_a_thread(service, monkeypatch):
    client, _ = service
    threads = set()

    def parse(text, _parse=hub.parse_qs):
        threads.add(threading.current_thread().name)
        return _parse(text)

    monkeypatch.setattr(hub, "parse_qs", parse)
    path = "/api/models/adapters/s/paths-info/main"
    answer = client.post(path, content="paths=adapter_config.json&" + "%ff=%ff&" * 1000)
    assert [one["path"] for one in answer.json()] == ["adapter_config.json"]
    assert all(one.startswith("long") for one in threads), threads
