"""What a body may say of itself, route by route: its coding, its tensors, its length."""

import contextlib
import json
import socket

import httpx
import numpy as np
import pytest
from conftest import assert_problem, serving, snapshot
from test_limits import BINARIES, BINARY, BODIES, D_IN, D_OUT, RAW, X, factors, pieces

from bonsai_lora.api.app import create_app
from bonsai_lora.api.body import parse_length
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

MERGE = "/v1/sets/s/adapters/a/merge"
ONE = "/v1/sets/s/adapters/a/apply"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A client, and the store; the set `s` has the modules a and b, (3 -> 2), of rank 2."""
    app = create_app(Settings(store=str(tmp_path_factory.mktemp("store"))))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 2}})
        for module in "ab":
            client.put(f"/v1/sets/s/adapters/{module}", json={"d_in": D_IN, "d_out": D_OUT})
        client.post("/v1/sets", json={"name": "t", "config": {"rank": 2}})
        yield client, app.state.store


def encoded_binary(make):
    tensors, metadata = make(X)
    return safetensors.encode(tensors, metadata)


WITH_BODIES = {
    name: (method, path, media, make(800))
    for name, (method, path, media, _, make) in BODIES.items()
    if not path.startswith("/v2")  # which takes compressed bodies, as its tests show
} | {
    f"{name}, binary": (method, path, BINARY, encoded_binary(make))
    for name, (method, path, make) in BINARIES.items()
}
WITH_BODIES |= {
    "merge, raw": ("POST", f"{MERGE}?dtype=F32", RAW, bytes(4 * D_IN * D_OUT)),
    "create": ("POST", "/v1/sets", "application/json", b'{"name": "new"}'),
}


@pytest.mark.parametrize("name", WITH_BODIES)
@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_compressed_bodies_are_refused(service, name, chunked):
    client, store = service
    method, path, media, body = WITH_BODIES[name]

    def send(*codings):
        client.delete("/v1/sets/new")
        lines = [("Content-Type", media), *(("Content-Encoding", one) for one in codings)]
        content = pieces(body) if chunked else body
        return client.request(method, path, content=content, headers=lines)

    for codings in ([], ["identity"], ["Identity"]):
        answer = send(*codings)
        assert answer.is_success, (codings, answer.text)
    client.delete("/v1/sets/new")
    before = snapshot(store)
    for codings in (["gzip"], ["deflate"], ["br"], ["gzip, identity"], ["identity", "gzip"]):
        answer = send(*codings)
        assert "Content-Encoding" in assert_problem(answer, 415, "unsupported_media_type")["detail"]
    assert snapshot(store) == before


EXTRA = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    ("path", "tensors", "metadata"),
    [
        (ONE, {"inputs": X, "other": EXTRA}, None),
        (ONE, {"inputs": X, "base_outputs": EXTRA, "other": EXTRA}, None),
        (ONE, {"inputs": X, "a": X}, None),
        (ONE, {"input": X}, None),
        (ONE, {"base_outputs": EXTRA}, None),
        ("/v1/sets/s/apply?module=a", {"inputs": X, "other": EXTRA}, None),
        ("/v1/sets/s/apply?module=a", {"inputs": X, "a": X}, None),
        ("/v1/sets/s/apply?module=a", {"inputs": X, "base_outputs": EXTRA}, None),
        ("/v1/sets/s/apply?module=a", {"a": X}, None),
        ("/v1/apply", {"inputs": X, "other": EXTRA}, {"module": "a", "sets": '["s"]'}),
        ("/v1/apply", {"a": X}, {"module": "a", "sets": '["s"]'}),
        (MERGE, {"weights": np.ones((D_OUT, D_IN), np.float32), "other": EXTRA}, None),
        (MERGE, {"weight": np.ones((D_OUT, D_IN), np.float32)}, None),
    ],
)
def test_tensors_that_nobody_asked_for(service, path, tensors, metadata):
    """Twice, and after a good request: what is remembered of a form must not let them in."""
    client, _ = service
    for _ in range(2):
        content = safetensors.encode(tensors, metadata)
        answer = client.post(path, content=content, headers={"Content-Type": BINARY})
        assert_problem(answer, 422, "invalid_request")
        if "weight" not in "".join(tensors):
            good = safetensors.encode({"inputs": X})
            answer = client.post(ONE, content=good, headers={"Content-Type": BINARY})
            assert answer.status_code == 200


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_weights_are_exactly_two_tensors(service, missing):
    client, store = service
    before = snapshot(store)
    some = factors()
    for tensors in (
        {**some, "more": EXTRA},
        {name: one for name, one in some.items() if name != missing},
        {name.lower(): one for name, one in some.items()},
    ):
        content = safetensors.encode(tensors)
        answer = client.put(
            "/v1/sets/t/adapters/m", content=content, headers={"Content-Type": BINARY}
        )
        assert_problem(answer, 422, "invalid_request")
    assert snapshot(store) == before


WEIGHTS = np.arange(D_OUT * D_IN, dtype=np.float32).reshape(D_OUT, D_IN)
MERGES = {
    "raw": (f"{MERGE}?dtype=F32", RAW, WEIGHTS.tobytes()),
    "safetensors": (MERGE, BINARY, safetensors.encode({"weights": WEIGHTS})),
}


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize(
    ("change", "declared", "chunked"),
    [
        # What follows or is missing; the answer where the length is declared, and where it is not.
        (lambda body: body + b"\0", (422, "shape_mismatch"), (422, "invalid_request")),
        (lambda body: body + bytes(4), (422, "shape_mismatch"), (422, "invalid_request")),
        (lambda body: body + body, (422, "shape_mismatch"), (422, "invalid_request")),
        (lambda body: body[:-1], (422, "shape_mismatch"), (400, "malformed_body")),
        (lambda body: body[:-4], (422, "shape_mismatch"), (400, "malformed_body")),
    ],
    ids=["a byte more", "a number more", "twice", "a byte less", "a number less"],
)
def test_merges_of_bodies_of_a_different_length(service, name, change, declared, chunked):
    client, _ = service
    path, media, good = MERGES[name]
    headers = {"Content-Type": media}
    body = change(good)
    assert_problem(client.post(path, content=body, headers=headers), *declared)
    assert_problem(client.post(path, content=pieces(body), headers=headers), *chunked)

    def with_the_rest_apart():
        yield good[: len(body)]
        yield body[len(good) :]

    assert_problem(client.post(path, content=with_the_rest_apart(), headers=headers), *chunked)
    for content in (good, pieces(good)):
        assert client.post(path, content=content, headers=headers).content == good


def talk(client, sent, seconds=20):
    """Send bytes on a connection of their own; give all that is answered while it stays open.

    `seconds` is how long to wait for more.
    """
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=seconds) as plain:
        plain.sendall(sent)
        answer = b""
        with contextlib.suppress(TimeoutError):
            while part := plain.recv(1 << 16):
                answer += part
    return answer


INNER = b"DELETE /v1/sets/victim HTTP/1.1\r\nHost: localhost\r\n\r\n"
REFUSED = {
    "unknown set": ("POST", "/v1/sets/none/adapters/a/apply", "application/json"),
    "unknown module": ("POST", "/v1/sets/s/adapters/none/apply", "application/json"),
    "unknown path": ("POST", "/nothing", "application/json"),
    "other method": ("PATCH", "/healthz", "application/json"),
    "wrong media type": ("POST", ONE, "text/csv"),
    "upload, wrong media type": ("PUT", "/v1/sets/u", "text/csv"),
    "create, wrong media type": ("POST", "/v1/sets", "text/csv"),
    "wrong name": ("PUT", "/v1/sets/v1", BINARY),
    "merge of an unknown set": ("POST", "/v1/sets/none/adapters/a/merge", RAW),
    "infer of an unknown model": ("POST", "/v2/models/none/infer", "application/json"),
    "not JSON": ("POST", ONE, "application/json"),
    "not safetensors": ("POST", ONE, BINARY),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("framing", ["Content-Length", "chunked"])
def test_the_body_of_a_refused_request_is_never_a_request(service, name, framing):
    """It holds a DELETE; behind the body comes a request that may be answered, or not."""
    client, store = service
    client.post("/v1/sets", json={"name": "victim"})
    method, path, media = REFUSED[name]
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media}\r\n".encode()
    if framing == "chunked":
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)
        head += b"Transfer-Encoding: chunked\r\n\r\n"
    else:
        body = INNER
        head += b"Content-Length: %d\r\n\r\n" % len(INNER)
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = talk(client, head + body + last)
    statuses = [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/")]
    assert 400 <= statuses[0] < 500, answer
    assert statuses[1:] in ([], [200]), answer
    assert "victim.safetensors" in snapshot(store)


@pytest.mark.parametrize("path", [ONE, "/v1/sets", "/v1/sets/s/apply", "/v2/models/s/infer"])
def test_what_follows_a_body_over_the_limit_is_not_answered(service, path):
    """The body is not read to its end, so nobody can say where the next request begins."""
    client, store = service
    client.post("/v1/sets", json={"name": "victim"})
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {1 << 40}\r\n\r\n".encode() + INNER
    answer = talk(client, sent, seconds=0.5)
    assert answer.count(b"HTTP/1.1") == 1, answer
    assert "victim.safetensors" in snapshot(store)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    ("declared", "length"),
    [
        (b"0", 0),
        (b"", 0),
        (b"000", 0),
        (b"12", 12),
        (b" \t0012 ", 12),
        (b"\x0c12", 0),
        (b"X12", 0),
        (b"1_2", 0),
        (b"-1", 0),
        (b"9" * 18, 10**18 - 1),
        (b"0" + b"9" * 18, 10**18 - 1),
        (b"1" + b"0" * 18, 10**18),
        (b"9" * 5000, 10**18),
    ],
)
def test_lengths_that_a_body_declares(declared, length):
    assert parse_length(declared) == length


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda more: {"name": "new", **dict.fromkeys(map(str, range(4095 + more)), 0)},
            "4097 fields",
        ),
        (lambda more: {"name": [0] * (16_385 + more)}, "16385 commas"),
    ],
    ids=["fields", "values"],
)
def test_what_a_model_may_be_wrong_in_is_counted_before_it_is_reported(service, make, words, more):
    """Each field that does not exist is an error with a text of its own."""
    client, store = service
    before = snapshot(store)
    content = json.dumps(make(more), separators=(",", ":"))
    answer = client.post("/v1/sets", content=content, headers={"Content-Type": "application/json"})
    problem = assert_problem(answer, 422, "invalid_request")
    assert (words in problem["detail"]) == (more == 1)
    assert snapshot(store) == before
