"""The second request of a form is answered by a plan, and nobody can tell."""

import contextlib
import json
import os
import re
import socket
import struct
import threading
import time
from multiprocessing.shared_memory import SharedMemory

import httpx
import numpy as np
import pytest
from conftest import TINY, assert_problem, serving, upload
from test_apply import Q_PROJ
from test_direct import connect, head_of, read_answer

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.service import plans
from bonsai_lora.storage.regions import SharedRegions

BINARY = {"Content-Type": "application/vnd.safetensors"}
JSON = b"application/json"
K_PROJ = Q_PROJ.replace("q_proj", "k_proj")
ONE = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"


@pytest.fixture
def plain(client):
    upload(client, "plain", TINY / "plain")
    return client


@pytest.fixture
def runs(monkeypatch):
    """How often a plan was run."""
    found = []
    real = plans.Plan.run

    def run(self, *arguments):
        found.append(self)
        return real(self, *arguments)

    monkeypatch.setattr(plans.Plan, "run", run)
    return found


def batch(rows=3, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)


def apply(client, x, path=ONE, **tensors):
    return client.post(path, content=safetensors.encode({"inputs": x, **tensors}), headers=BINARY)


def outputs(answer):
    assert answer.status_code == 200, answer.text
    return safetensors.decode(answer.content)[0]


def by_json(client, x, path=ONE):
    """The outputs by the ordinary way: stacks have no plans."""
    asked = {"inputs": x.tolist(), "sets": ["plain"]}
    return np.array(client.post(path, json=asked).json()["outputs"], np.float32)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (700, 64), (3000, 64)])
def test_the_numbers_are_each_requests_own(plain, runs, shape):
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        got = outputs(apply(plain, x))["outputs"]
        assert got.shape == (*shape[:-1], 128)
        assert np.abs(got - by_json(plain, x)).max() < 1e-5
    assert len(runs) == 2


def check_same(first, second):
    """Two answers, but for when they were given and to which request."""
    assert first.content == second.content
    for one in (first, second):
        assert one.headers.pop("x-request-id")
        assert one.headers.pop("date")
    assert dict(first.headers) == dict(second.headers)


def test_answers_are_the_same_to_the_header(plain, runs):
    first, second = (apply(plain, batch()) for _ in range(2))
    assert len(runs) == 1
    check_same(first, second)


def test_what_the_head_asks_is_part_of_the_form(plain, runs):
    x = batch()
    for path, factor in ((ONE, 1), (f"{ONE}?scale=-2", -2), (ONE, 1), (f"{ONE}?scale=-2", -2)):
        got = outputs(apply(plain, x, path))["outputs"]
        assert np.abs(got - factor * by_json(plain, x)).max() < 1e-5
    assert len(runs) == 2
    half = outputs(apply(plain, x, f"{ONE}?dtype=F16"))["outputs"]
    assert half.dtype == np.float16


def test_a_changed_set_is_seen_at_once(plain, runs):
    x = batch()
    for _ in range(2):
        before = outputs(apply(plain, x))["outputs"]
    upload(plain, "plain", TINY / "rslora-patterns")
    answer = apply(plain, x)
    after = outputs(answer)["outputs"]
    assert safetensors.decode_header(answer.content).metadata["version"] == "2"
    assert np.abs(after - by_json(plain, x)).max() < 1e-5
    assert np.abs(after - before).max() > 1e-3
    assert len(runs) == 1
    plain.delete("/v1/sets/plain")
    assert_problem(apply(plain, x), 404, "set_not_found")


def test_refusals_are_the_same(plain, runs):
    good = batch()
    for _ in range(2):
        apply(plain, good)
    bad = good.copy()
    bad[2, 5] = np.nan
    problem = assert_problem(apply(plain, bad), 422, "non_finite_input")
    assert problem["index"] == [2, 5]
    body = safetensors.encode({"inputs": good})
    for wrong in (body[:-4], body + bytes(4)):
        answer = plain.post(ONE, content=wrong, headers=BINARY)
        assert_problem(answer, 400, "malformed_safetensors")
    large = np.full((3, 64), 3e38, np.float32)  # finite, but no sum of them is
    assert not np.isfinite(outputs(apply(plain, large))["outputs"]).all()


def test_many_modules_in_one_request(plain, runs):
    x, y = batch(seed=1), batch(rows=2, seed=2)
    path = "/v1/sets/plain/apply"
    body = safetensors.encode({K_PROJ: y, Q_PROJ: x})
    for _ in range(2):
        got = outputs(plain.post(path, content=body, headers=BINARY))
        assert np.abs(got[Q_PROJ] - by_json(plain, x)).max() < 1e-5
        assert np.abs(got[K_PROJ] - by_json(plain, y, ONE.replace(Q_PROJ, K_PROJ))).max() < 1e-5
    path = f"{path}?module={Q_PROJ}&module={K_PROJ}"
    for _ in range(2):
        got = outputs(apply(plain, x, path))
        assert np.abs(got[Q_PROJ] - by_json(plain, x)).max() < 1e-5
        assert got[K_PROJ].shape == (3, 64)
    assert len(runs) == 2


def test_what_has_no_plan(based, runs):
    """Other dtypes, stacks, DoRA: they go the ordinary way each time."""
    plain = based
    upload(plain, "plain", TINY / "plain")
    upload(plain, "dora", TINY / "dora")
    x = batch()
    dora = ONE.replace("plain", "dora")
    for _ in range(2):
        outputs(apply(plain, x.astype(np.float16)))
        stack = safetensors.encode({"inputs": x}, {"sets": json.dumps(["plain"])})
        outputs(plain.post(ONE, content=stack, headers=BINARY))
        outputs(apply(plain, x, dora, base_outputs=np.ones((3, 128), np.float32)))
        assert outputs(apply(plain, batch(rows=0)))["outputs"].shape == (0, 128)
        by_json(plain, x)
    assert not runs


def test_forms_without_end_are_forgotten(app, plain):
    x = batch()
    for number in range(100):
        body = safetensors.encode({"inputs": x}, {"number": str(number)})
        outputs(plain.post(ONE, content=body, headers=BINARY))
    assert 0 < len(app.state.context.store.read("plain").memo) <= 16


def infer(client, x, name=Q_PROJ, more=(), **fields):
    tensor = {"name": name, "shape": list(x.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    asked = {"inputs": [tensor, *more], "parameters": {"binary_data_output": True}, **fields}
    head = json.dumps(asked).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = client.post("/v2/models/plain/infer", content=head + x.tobytes(), headers=headers)
    assert answer.status_code == 200, answer.text
    length = int(answer.headers["Inference-Header-Content-Length"])
    return json.loads(answer.content[:length]), answer.content[length:]


def infer_json(client, x, name=Q_PROJ, **fields):
    tensor = {"name": name, "shape": list(x.shape), "datatype": "FP32", "data": x.tolist()}
    answer = client.post("/v2/models/plain/infer", json={"inputs": [tensor], **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_inferences(plain, runs, rows):
    for seed in range(3):
        x = batch(rows, seed)
        fields, data = infer(plain, x)
        assert "id" not in fields
        got = np.frombuffer(data, np.float32).reshape(rows, 128)
        assert np.abs(got - by_json(plain, x)).max() < 1e-5
    (counts,) = plain.get("/v2/models/plain/stats").json()["model_stats"]
    assert counts["inference_count"] == 3 * rows
    assert counts["execution_count"] == 3
    assert counts["inference_stats"]["success"]["count"] == 3
    assert counts["inference_stats"]["compute_infer"]["ns"] > 0
    if rows < 700:  # the longest wait for their turn
        assert len(runs) == 2


def test_requests_with_ids_have_no_plan(plain, runs):
    for number in ("7", "8", "8"):
        assert infer(plain, batch(), id=number)[0]["id"] == number
        assert infer_json(plain, batch(), id=number)["id"] == number
    assert not runs


def test_an_input_for_several_outputs(plain, runs):
    x = batch()
    asked = [{"name": Q_PROJ}, {"name": K_PROJ}]
    for _ in range(2):
        fields, data = infer(plain, x, "x", outputs=asked)
        assert [one["name"] for one in fields["outputs"]] == [Q_PROJ, K_PROJ]
        got = np.frombuffer(data, np.float32, 3 * 128).reshape(3, 128)
        assert np.abs(got - by_json(plain, x)).max() < 1e-5
    assert len(runs) == 1


def test_shared_memory(settings, runs):
    key = f"bonsai-plan-{os.getpid()}"
    memory = SharedMemory(name=key, create=True, size=1 << 16)
    x = batch()
    try:
        app = create_app(settings.model_copy(update={"shared_memory": True}))
        with serving(app) as url, httpx.Client(base_url=url) as client:
            upload(client, "plain", TINY / "plain")
            region = "/v2/systemsharedmemory/region/r"
            registered = {"key": key, "offset": 0, "byte_size": 1 << 16}
            assert client.post(f"{region}/register", json=registered).status_code == 200
            place = {"shared_memory_region": "r", "shared_memory_byte_size": x.nbytes}
            there = {**place, "shared_memory_offset": 4096, "shared_memory_byte_size": 3 * 512}
            tensor = {"name": Q_PROJ, "shape": [3, 64], "datatype": "FP32", "parameters": place}
            asked = {"inputs": [tensor], "outputs": [{"name": Q_PROJ, "parameters": there}]}

            def ask():
                return client.post("/v2/models/plain/infer", json=asked)

            for seed in range(3):
                x = batch(seed=seed)
                memory.buf[: x.nbytes] = x.tobytes()
                memory.buf[4096 : 4096 + 1536] = bytes(1536)
                assert ask().status_code == 200
                got = np.frombuffer(bytes(memory.buf[4096 : 4096 + 1536]), np.float32)
                assert np.abs(got.reshape(3, 128) - by_json(client, x)).max() < 1e-5
            assert len(runs) == 2
            bad = x.copy()
            bad[1, 1] = np.inf
            memory.buf[: x.nbytes] = bad.tobytes()
            memory.buf[4096 : 4096 + 1536] = bytes(1536)
            assert ask().status_code == 400
            assert not any(memory.buf[4096 : 4096 + 1536])
            client.post(f"{region}/unregister")
            assert ask().status_code == 404
    finally:
        memory.close()
        memory.unlink()


def test_rows_are_counted_alike_with_and_without_a_plan(plain, runs):
    x = batch()
    for number in range(1, 4):
        infer(plain, x, "x", outputs=[{"name": Q_PROJ}, {"name": K_PROJ}])
        (counts,) = plain.get("/v2/models/plain/stats").json()["model_stats"]
        assert counts["inference_count"] == 3 * number
        assert f"bonsai_lora_rows_applied_total {6.0 * number}" in plain.get("/metrics").text
    assert len(runs) == 2


def test_an_input_in_shared_memory_is_read_once(settings, runs, monkeypatch):
    """Else two outputs of one answer might come from different numbers."""
    reads = []
    real = SharedRegions.read
    monkeypatch.setattr(
        SharedRegions, "read", lambda self, place: reads.append(place) or real(self, place)
    )
    key = f"bonsai-once-{os.getpid()}"
    memory = SharedMemory(name=key, create=True, size=4096)
    try:
        app = create_app(settings.model_copy(update={"shared_memory": True}))
        with serving(app) as url, httpx.Client(base_url=url) as client:
            upload(client, "plain", TINY / "plain")
            registered = {"key": key, "offset": 0, "byte_size": 4096}
            client.post("/v2/systemsharedmemory/region/r/register", json=registered)
            place = {"shared_memory_region": "r", "shared_memory_byte_size": 256}
            tensor = {"name": "x", "shape": [1, 64], "datatype": "FP32", "parameters": place}
            outputs = [{"name": name} for name in (Q_PROJ, K_PROJ)]
            asked = {"inputs": [tensor], "outputs": outputs}
            asked["parameters"] = {"binary_data_output": True}
            for _ in range(3):
                assert client.post("/v2/models/plain/infer", json=asked).status_code == 200
        assert len(runs) == 2
        assert len(reads) == 3
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize(("rank", "width"), [(0, 4), (1, 1)])
def test_what_hides_numbers_that_are_not_finite(client, runs, rank, width):
    """An A with no numbers, or the one number 0."""
    client.post("/v1/sets", json={"name": "s"})
    tensors = {
        "lora_A": np.zeros((rank, width), np.float32),
        "lora_B": np.ones((3, rank), np.float32),
    }
    path = "/v1/sets/s/adapters/m"
    assert client.put(path, content=safetensors.encode(tensors), headers=BINARY).status_code == 201
    x = np.ones((3, width), np.float32)
    bad = x.copy()
    bad[1, 0] = np.nan
    for _ in range(2):
        assert_problem(apply(client, bad, f"{path}/apply"), 422, "non_finite_input")
        outputs(apply(client, x, f"{path}/apply"))
    weights = safetensors.encode({"weights": np.ones((3, width), np.float32)})
    assert client.post(f"{path}/merge", content=weights, headers=BINARY).status_code == 200


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (40, 64), (500, 64)])
def test_json_numbers_are_each_requests_own(plain, runs, shape):
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        answer = plain.post(ONE, json={"inputs": x.tolist()})
        assert answer.json().keys() == {"set", "module", "version", "outputs"}
        got = np.array(answer.json()["outputs"], np.float32)
        assert np.array_equal(got, by_json(plain, x))
    assert len(runs) == (0 if shape[0] == 500 else 3)  # of much JSON, the numbers take the time


def test_json_answers_are_the_same_to_the_header(plain, runs):
    x = batch(2).tolist()
    tensor = {"name": "x", "shape": [2, 64], "datatype": "FP32", "data": x}
    asked = {"inputs": [tensor], "outputs": [{"name": Q_PROJ}, {"name": K_PROJ}]}
    for path, body in (
        (ONE, {"inputs": x}),
        (f"{ONE}?scale=3", {"inputs": x, "sets": []}),
        ("/v1/sets/plain/apply", {"inputs": {K_PROJ: x, Q_PROJ: x[:1]}}),
        (f"/v1/sets/plain/apply?module={K_PROJ}&module={Q_PROJ}", {"inputs": x}),
        ("/v2/models/plain/infer", asked),
        ("/v2/models/plain/infer", {**asked, "parameters": {"scale": -2}}),
    ):
        before = len(runs)
        first, second = (plain.post(path, json=body) for _ in range(2))
        assert len(runs) == before + 1
        assert first.status_code == 200
        check_same(first, second)


def test_json_inferences(plain, runs):
    for seed in range(3):
        x = batch(5, seed)
        fields = infer_json(plain, x)
        (output,) = fields["outputs"]
        assert (output["name"], output["shape"]) == (Q_PROJ, [5, 128])
        got = np.array(output["data"], np.float32).reshape(5, 128)
        assert np.array_equal(got, by_json(plain, x))
    (counts,) = plain.get("/v2/models/plain/stats").json()["model_stats"]
    assert (counts["inference_count"], counts["execution_count"]) == (15, 3)
    assert len(runs) == 2


def test_json_of_another_form_takes_the_ordinary_way(plain, runs):
    x = batch(4)
    for _ in range(2):
        plain.post(ONE, json={"inputs": x.tolist()})
    assert len(runs) == 1
    text = json.dumps({"inputs": x.tolist()})
    for body, status, code in (
        (json.dumps({"inputs": x[:, :63].tolist()}), 422, "shape_mismatch"),
        (json.dumps({"inputs": [*x.tolist(), [1.0]]}), 422, "ragged_input"),
        (text.replace("[[", "[[1e39, ").replace("]]", "]]", 1), 422, "ragged_input"),
        (text[:-2] + "}", 400, "malformed_json"),
        (text[:-1] + ', "more": 1}', 422, "invalid_request"),
        (text + " " + text, 400, "malformed_json"),
        (json.dumps({"inputs": np.full((4, 64), 3e38).tolist()}), 422, "non_finite_output"),
        (json.dumps({"inputs": [[1e39] * 64] * 4}), 422, "non_finite_input"),
        (json.dumps({"inputs": [[float("nan")] * 64] * 4}), 422, "non_finite_input"),
    ):
        plain.post(ONE, json={"inputs": x.tolist()})  # so that forms are looked at
        for _ in range(2):
            answer = plain.post(ONE, content=body, headers={"Content-Type": "application/json"})
            assert_problem(answer, status, code)
    other = '{"inputs": [3], ' + text[1:]  # the last one counts
    answer = plain.post(ONE, content=other, headers={"Content-Type": "application/json"})
    assert np.array_equal(np.array(answer.json()["outputs"], np.float32), by_json(plain, x))


def test_a_changed_set_is_seen_at_once_in_json(plain):
    x = batch()
    for _ in range(3):
        assert plain.post(ONE, json={"inputs": x.tolist()}).json()["version"] == 1
    upload(plain, "plain", TINY / "rslora-patterns")
    for _ in range(3):
        answer = plain.post(ONE, json={"inputs": x.tolist()}).json()
        assert answer["version"] == 2
        assert np.array_equal(np.array(answer["outputs"], np.float32), by_json(plain, x))


def test_json_over_the_limit_is_refused_although_there_is_a_plan(settings, runs):
    app = create_app(settings.model_copy(update={"max_json_bytes": 5000}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        upload(client, "plain", TINY / "plain")
        for _ in range(2):
            assert client.post(ONE, json={"inputs": batch().tolist()}).status_code == 200
        assert len(runs) == 1
        text = json.dumps({"inputs": batch().tolist()}).replace(", ", ",          ")
        answer = client.post(ONE, content=text, headers={"Content-Type": "application/json"})
        assert_problem(answer, 413, "body_too_large")
        assert len(runs) == 1


def test_json_in_pieces_is_planned_too(plain, runs):
    bodies = [json.dumps({"inputs": batch(rows).tolist()}).encode() for rows in (3, 70)]
    assert len(bodies[1]) > 1 << 16  # more than is waited for
    with connect(plain) as connection:
        for body in bodies:
            answers = []
            for _ in range(3):
                head = head_of(len(body), ONE).replace(BINARY["Content-Type"].encode(), JSON)
                connection.sendall(head + body[:50])
                time.sleep(0.02)
                connection.sendall(body[50:])
                status, answer, rest = read_answer(connection)
                assert (status, rest) == (200, b"")
                answers.append(answer)
            assert len(set(answers)) == 1
    assert len(runs) == 4


def test_headers_that_decide_nothing_do_not_matter(plain, runs):
    body = safetensors.encode({"inputs": batch()})
    for number in range(3):
        headers = BINARY | {"X-Request-Id": str(number), "traceparent": f"00-{number}"}
        answer = plain.post(ONE, content=body, headers=headers)
        assert answer.headers["x-request-id"] == str(number)
    assert len(runs) == 2


def test_hundreds_of_requests_at_once(plain):
    """They take turns with others, and come back in their order."""
    bodies = [safetensors.encode({"inputs": batch(seed=seed)}) for seed in range(3)]
    right = [by_json(plain, batch(seed=seed)) for seed in range(3)]
    order = [number % 3 for number in range(400)]
    sent = b"".join(head_of(len(bodies[one]), ONE) + bodies[one] for one in order)
    with connect(plain) as connection:
        threading.Thread(target=connection.sendall, args=(sent,)).start()
        rest = b""
        for one in order:
            status, answer, rest = read_answer(connection, rest)
            assert status == 200
            assert np.abs(safetensors.decode(answer)[0]["outputs"] - right[one]).max() < 1e-5
        assert rest == b""


def test_a_client_that_goes_away_amid_many_requests(plain, capfd):
    body = safetensors.encode({"inputs": batch()})
    one = head_of(len(body), ONE) + body
    for _ in range(20):
        with connect(plain) as connection:
            connection.sendall(one * 60)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    outputs(apply(plain, batch()))
    assert "Traceback" not in capfd.readouterr().err


def test_they_are_counted_and_have_ids(plain, runs):
    for number in range(4):
        body = safetensors.encode({"inputs": batch()})
        headers = BINARY | {"X-Request-Id": "mine"} if number == 3 else BINARY
        answer = plain.post(ONE, content=body, headers=headers)
        assert (answer.headers["x-request-id"] == "mine") == (number == 3)
    text = plain.get("/metrics").text
    values = dict(re.findall(r"^(bonsai_lora_[^ #]+) ([\d.e+]+)$", text, re.MULTILINE))
    route = 'method="POST",route="/v1/sets/{set}/adapters/{module}/apply"'
    assert values[f'bonsai_lora_requests_total{{{route},status="200"}}'] == "4.0"
    assert values["bonsai_lora_rows_applied_total"] == "12.0"


def test_answers_keep_their_order(plain):
    """Planned ones, ordinary ones, the framework's, and what no parser takes, in one packet."""
    x = batch()
    body = safetensors.encode({"inputs": x})
    one = head_of(len(body), ONE) + body
    other = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    wrong = head_of(2, ONE) + b"{}"
    right = by_json(plain, x)
    with connect(plain) as connection:
        connection.sendall(one + one + other + one + wrong + one)
        rest = b""
        found = []
        for _ in range(6):
            status, answer, rest = read_answer(connection, rest)
            found.append(status)
            if status == 200 and len(answer) > 100:
                got = safetensors.decode(answer)[0]["outputs"]
                assert np.abs(got - right).max() < 1e-5
        assert found == [200, 200, 200, 200, 400, 200]
    with connect(plain) as connection:
        connection.sendall(one + one + b"nonsense\r\n\r\n")
        rest = b""
        for wanted in (200, 200, 400):
            status, _, rest = read_answer(connection, rest)
            assert status == wanted
        assert connection.recv(10) == b""


def test_bodies_in_pieces_are_planned_too(plain, runs):
    x = batch()
    body = safetensors.encode({"inputs": x})
    with connect(plain) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(3):
            connection.sendall(head_of(len(body), ONE))
            connection.sendall(body[:100])
            connection.sendall(body[100:])
            status, answer, rest = read_answer(connection)
            assert (status, rest) == (200, b"")
            got = safetensors.decode(answer)[0]["outputs"]
            assert np.abs(got - by_json(plain, x)).max() < 1e-5
    assert len(runs) == 2


def test_a_short_body_that_does_not_come(settings):
    app = create_app(settings.model_copy(update={"stall_seconds": 0.3}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        upload(client, "plain", TINY / "plain")
        with connect(client) as connection:
            connection.sendall(head_of(500, ONE) + bytes(10))
            status, answer, _ = read_answer(connection)
            assert (status, json.loads(answer)["code"]) == (408, "stalled")
            assert connection.recv(10) == b""


def test_a_refused_body_is_passed_over(plain):
    """Its bytes are not taken for the next request."""
    x = batch()
    body = safetensors.encode({"inputs": x})
    with connect(plain) as connection:
        refused = b"POST /v1/" * (1 << 15)
        connection.sendall(head_of(len(refused), ONE.replace(Q_PROJ, "nothing")))
        assert read_answer(connection)[0] == 404
        connection.sendall(refused)
        connection.sendall(head_of(len(body), ONE) + body)
        assert read_answer(connection)[0] == 200


def test_a_refusal_of_who_waits_to_send_ends_the_connection(plain):
    """Nobody knows whether the body will come."""
    with connect(plain) as connection:
        path = ONE.replace(Q_PROJ, "nothing")
        connection.sendall(head_of(1 << 20, path, Expect="100-continue"))
        assert read_answer(connection)[0] == 404
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(10) == b""
