"""Each limit at its value and one above, on every route and in every form that can meet it."""

import json

import httpx
import numpy as np
import pytest
from conftest import assert_problem, peft_config, serving, snapshot

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

BINARY, JSON = "application/vnd.safetensors", "application/json"
RAW = "application/octet-stream"
LIMITS = {
    "max_json_bytes": 3000,
    "max_body_bytes": 6000,
    "max_upload_bytes": 9000,
    "max_header_bytes": 900,
    "max_rows": 8,
    "max_rank": 4,
    "max_answer_bytes": 4 * 48,
}
D_IN, D_OUT = 3, 2


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A client, and the store; the set `s` has the modules a and b, (3 -> 2), of rank 2."""
    app = create_app(Settings(store=str(tmp_path_factory.mktemp("store")), **LIMITS))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 2}})
        for module in "ab":
            client.put(f"/v1/sets/s/adapters/{module}", json={"d_in": D_IN, "d_out": D_OUT})
        client.post("/v1/sets", json={"name": "t", "config": {"rank": 2}})
        yield client, app.state.store


def refused(answer, path, status, code):
    """The answer is that refusal, in the form of its protocol."""
    if path.startswith("/v2"):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]
    else:
        assert_problem(answer, status, code)


# Bodies of any given length: route -> (method, path, media type, limit, body).

BOUNDARY = "multipart/form-data; boundary=cut"


def padded_json(value, size):
    return json.dumps(value).encode().ljust(size)


def padded_binary(tensors, size, metadata=None):
    """Safetensors whose length is made up by data that nobody asks for: more rows of `inputs`."""
    body = safetensors.encode(tensors, metadata)
    (length,) = np.frombuffer(body[:8], np.uint64)
    header, data = body[8 : 8 + int(length)], body[8 + int(length) :]
    header = header.ljust(size - 8 - len(data))
    return len(header).to_bytes(8, "little") + header + data


def factors(rank=2, d_in=D_IN, d_out=D_OUT):
    return {
        "lora_A": np.ones((rank, d_in), np.float32),
        "lora_B": np.ones((d_out, rank), np.float32),
    }


def peft_tensors(rank=2, module="q_proj", d_in=D_IN, d_out=D_OUT):
    named = factors(rank, d_in, d_out)
    return {f"base_model.model.{module}.{half}.weight": one for half, one in named.items()}


def form(config, tensors, size=0):
    """A multipart upload, made `size` bytes long by blanks in the configuration."""

    def made(blanks):
        parts = (("adapter_config", json.dumps(config).encode() + b" " * blanks),)
        parts += (("adapter_model", safetensors.encode(tensors)),)
        head = b'--cut\r\nContent-Disposition: form-data; name="%b"; filename="f"\r\n\r\n%b\r\n'
        return b"".join(head % (name.encode(), one) for name, one in parts) + b"--cut--\r\n"

    return made(max(0, size - len(made(0))))


X = np.ones((1, D_IN), np.float32)
OIP = {"inputs": [{"name": "a", "shape": [1, D_IN], "datatype": "FP32", "data": [1, 2, 3]}]}
ONE, MANY, MIXED = "/v1/sets/s/adapters/a/apply", "/v1/sets/s/apply", "/v1/apply"
ROWS = {"module": "a", "sets": ["s"]}
WIDE = {"module": "a", "sets": json.dumps(["s"])}

BODIES = {
    "apply, JSON": ("POST", ONE, JSON, "json", lambda n: padded_json({"inputs": X.tolist()}, n)),
    "many, JSON": ("POST", MANY, JSON, "json", lambda n: padded_json({"inputs": {"a": X.tolist()}}, n)),
    "mixed, JSON": ("POST", MIXED, JSON, "json", lambda n: padded_json({**ROWS, "inputs": X.tolist()}, n)),
    "merge, JSON": ("POST", "/v1/sets/s/adapters/a/merge", JSON, "json", lambda n: padded_json({"weights": np.ones((D_OUT, D_IN)).tolist()}, n)),
    "weights, JSON": ("PUT", "/v1/sets/t/adapters/m", JSON, "json", lambda n: padded_json({k: v.tolist() for k, v in factors().items()}, n)),
    "new module": ("PUT", "/v1/sets/t/adapters/m", JSON, "json", lambda n: padded_json({"d_in": 3, "d_out": 2}, n)),
    "infer, JSON": ("POST", "/v2/models/s/infer", JSON, "json", lambda n: padded_json(OIP, n)),
    "upload": ("PUT", "/v1/sets/u", BOUNDARY, "upload", lambda n: form(peft_config(r=2), peft_tensors(), n)),
}  # fmt: skip


def pieces(body):
    """For httpx to send chunked: no Content-Length, and the excess comes last."""
    yield body[: len(body) // 2]
    yield body[len(body) // 2 :]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_bodies_as_long_as_allowed_and_one_byte_longer(service, name, chunked):
    client, store = service
    method, path, media, limit, make = BODIES[name]
    most = LIMITS[f"max_{limit}_bytes"]

    def send(size):
        body = make(size)
        assert len(body) == size
        content = pieces(body) if chunked else body
        return client.request(method, path, content=content, headers={"Content-Type": media})

    assert send(most - 1).is_success
    answer = send(most)
    assert answer.is_success, answer.text
    before = snapshot(store)
    refused(send(most + 1), path, 413, "body_too_large")
    refused(send(most + 700), path, 413, "body_too_large")
    assert snapshot(store) == before


BINARIES = {
    "apply": ("POST", ONE, lambda rows: ({"inputs": rows}, None)),
    "many": ("POST", MANY, lambda rows: ({"a": rows}, None)),
    "shared": ("POST", f"{MANY}?module=a&module=b", lambda rows: ({"inputs": rows}, None)),
    "mixed": ("POST", MIXED, lambda rows: ({"inputs": rows}, WIDE)),
    "weights": ("PUT", "/v1/sets/t/adapters/m", lambda _: (factors(), None)),
    "merge": ("POST", "/v1/sets/s/adapters/a/merge", lambda _: ({"weights": np.ones((D_OUT, D_IN), np.float32)}, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", BINARIES)
@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_headers_of_tensors_as_long_as_allowed_and_longer(service, name, chunked):
    client, store = service
    method, path, make = BINARIES[name]
    tensors, metadata = make(X)
    most = LIMITS["max_header_bytes"]
    data = sum(one.nbytes for one in tensors.values())

    def send(header_bytes):
        body = padded_binary(tensors, 8 + header_bytes + data, metadata)
        assert int.from_bytes(body[:8], "little") == header_bytes
        content = pieces(body) if chunked else body
        return client.request(method, path, content=content, headers={"Content-Type": BINARY})

    assert send(most - 1).is_success
    answer = send(most)
    assert answer.is_success, answer.text
    before = snapshot(store)
    assert_problem(send(most + 1), 413, "header_too_large")
    assert snapshot(store) == before


@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_binary_bodies_as_long_as_allowed_and_longer(service, chunked):
    """The bytes of a body of weights: the longest that fits, and the next."""
    client, store = service

    def send(width):
        body = safetensors.encode(factors(rank=1, d_in=width, d_out=1))
        content = pieces(body) if chunked else body
        headers = {"Content-Type": BINARY}
        return len(body), client.put("/v1/sets/t/adapters/m", content=content, headers=headers)

    most, width = LIMITS["max_body_bytes"], 1
    while len(safetensors.encode(factors(rank=1, d_in=width + 1, d_out=1))) <= most:
        width += 1
    size, answer = send(width)
    assert most - 64 < size <= most
    assert answer.is_success, answer.text
    before = snapshot(store)
    for more in (1, 100):
        size, answer = send(width + more)
        assert size > most
        assert_problem(answer, 413, "body_too_large")
    assert snapshot(store) == before


def test_the_header_of_an_upload(service):
    """The limit is on the bytes of the uploaded file's own header."""
    client, store = service
    most = LIMITS["max_header_bytes"]
    for size, status in ((most, 201), (most + 1, 413)):
        body = padded_binary(peft_tensors(), 8 + size + 4 * 2 * (D_IN + D_OUT))
        files = {"adapter_config": json.dumps(peft_config(r=2)), "adapter_model": body}
        client.delete("/v1/sets/u")
        answer = client.put("/v1/sets/u", files=files)
        assert answer.status_code == status, answer.text
    assert "u.safetensors" not in snapshot(store)


RANKED = {
    "create": lambda c, r: c.post("/v1/sets", json={"name": "new", "config": {"rank": r}, "attention": {"hidden_size": 2, "num_heads": 1}}),
    "create empty": lambda c, r: c.post("/v1/sets", json={"name": "new", "config": {"rank": r}}),
    "new module": lambda c, r: c.put("/v1/sets/t/adapters/r", json={"d_in": 2, "d_out": 2, "config": {"rank": r}}),
    "weights, JSON": lambda c, r: c.put("/v1/sets/t/adapters/r", json={k: v.tolist() for k, v in factors(r).items()}),
    "weights, binary": lambda c, r: c.put("/v1/sets/t/adapters/r", content=safetensors.encode(factors(r)), headers={"Content-Type": BINARY}),
    "upload": lambda c, r: c.put("/v1/sets/new", files={"adapter_config": json.dumps(peft_config(r=r)), "adapter_model": safetensors.encode(peft_tensors(r))}),
    "upload, pattern": lambda c, r: c.put("/v1/sets/new", files={"adapter_config": json.dumps(peft_config(r=1, rank_pattern={"q_proj": r})), "adapter_model": safetensors.encode(peft_tensors(r))}),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKED)
def test_the_highest_rank_and_the_next(service, name):
    client, store = service
    most = LIMITS["max_rank"]
    for rank in (most - 1, most):
        client.delete("/v1/sets/new")
        answer = RANKED[name](client, rank)
        assert answer.is_success, answer.text
    client.delete("/v1/sets/new")
    before = snapshot(store)
    for rank in (most + 1, most + 5):
        body = assert_problem(RANKED[name](client, rank), 422, "rank_too_large")
        assert (body["got"], body["limit"]) == (rank, most)
    assert snapshot(store) == before


def binary_infer(client, path, inputs):
    tensors = [
        {"name": name, "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
        for name, x in inputs.items()
    ]  # fmt: skip
    head = json.dumps({"inputs": tensors}).encode()
    body = head + b"".join(x.tobytes() for x in inputs.values())
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return client.post(path, content=body, headers=headers)


def in_binary(path, make):
    def send(client, counts):
        tensors, metadata = make(counts)
        headers = {"Content-Type": BINARY}
        return client.post(path, content=safetensors.encode(tensors, metadata), headers=headers)

    return path, send


def rows(count):
    return np.ones((count, D_IN), np.float32)


def oip_tensor(name, count):
    x = rows(count)
    return {"name": name, "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}


APPLIES = {
    # Rows for each module of the request, in the order a, b.
    "apply, JSON": (1, ONE, lambda c, n: c.post(ONE, json={"inputs": rows(n[0]).tolist()})),
    "apply, binary": (1, *in_binary(ONE, lambda n: ({"inputs": rows(n[0])}, None))),
    "many, JSON": (2, MANY, lambda c, n: c.post(MANY, json={"inputs": {m: rows(k).tolist() for m, k in zip("ab", n, strict=True)}})),
    "many, binary": (2, *in_binary(MANY, lambda n: ({m: rows(k) for m, k in zip("ab", n, strict=True)}, None))),
    "mixed, JSON": (1, MIXED, lambda c, n: c.post(MIXED, json={"module": "a", "sets": ["s"] * n[0], "inputs": rows(n[0]).tolist()})),
    "mixed, binary": (1, *in_binary(MIXED, lambda n: ({"inputs": rows(n[0])}, {"module": "a", "sets": json.dumps(["s"] * n[0])}))),
    "infer, JSON": (2, "/v2/models/s/infer", lambda c, n: c.post("/v2/models/s/infer", json={"inputs": [oip_tensor(m, k) for m, k in zip("ab", n, strict=True)]})),
    "infer, binary": (2, "/v2/models/s/infer", lambda c, n: binary_infer(c, "/v2/models/s/infer", {m: rows(k) for m, k in zip("ab", n, strict=True)})),
}  # fmt: skip


@pytest.mark.parametrize("name", APPLIES)
def test_the_most_rows_and_one_more(service, name):
    """Twice each, for what is remembered of a request must be checked like the first."""
    client, _ = service
    modules, path, send = APPLIES[name]
    most = LIMITS["max_rows"]
    for _ in range(2):
        for count in (1, most - 1, most):
            answer = send(client, [count] * modules)
            assert answer.status_code == 200, answer.text
        for place in range(modules):  # the longest may be any of them
            counts = [1] * modules
            counts[place] = most + 1
            refused(send(client, counts), path, 413, "too_many_rows")


@pytest.mark.parametrize(
    ("path", "send"),
    [
        (MANY, lambda c, n: c.post(MANY, json={"inputs": {m: rows(k).tolist() for m, k in zip("abcde", n, strict=False)}})),
        in_binary(MANY, lambda n: ({m: rows(k) for m, k in zip("abcde", n, strict=False)}, None)),
        ("/v2/models/s/infer", lambda c, n: c.post("/v2/models/s/infer", json={"inputs": [oip_tensor(m, k) for m, k in zip("abcde", n, strict=False)]})),
        ("/v2/models/s/infer", lambda c, n: binary_infer(c, "/v2/models/s/infer", {m: rows(k) for m, k in zip("abcde", n, strict=False)})),
    ],
    ids=["JSON", "binary", "infer, JSON", "infer, binary"],
)  # fmt: skip
def test_the_largest_answer_is_a_sum_over_modules(service, path, send):
    """48 numbers may be answered; a row of a module gives 2, and no module has over 8 rows."""
    client, _ = service
    for module in "cde":
        client.put(f"/v1/sets/s/adapters/{module}", json={"d_in": D_IN, "d_out": D_OUT})
    for _ in range(2):
        for counts in ([8, 8, 8], [8, 8, 7, 1], [4, 5, 5, 5, 5]):
            assert 2 * sum(counts) == 48
            answer = send(client, counts)
            assert answer.status_code == 200, answer.text
        for counts in ([8, 8, 8, 1], [5, 5, 5, 5, 5]):
            refused(send(client, counts), path, 413, "answer_too_large")


def test_the_largest_answer_where_one_batch_feeds_several_modules(service):
    client, _ = service
    for module in "cde":
        client.put(f"/v1/sets/s/adapters/{module}", json={"d_in": D_IN, "d_out": D_OUT})
    for modules, status in (("abc", 200), ("abcd", 413)):
        path = MANY + "?" + "&".join(f"module={one}" for one in modules)
        answer = client.post(path, json={"inputs": rows(8).tolist()})
        assert answer.status_code == status, answer.text
        shared = {"name": "x", "shape": [8, D_IN], "datatype": "FP32", "data": [1.0] * 24}
        body = {"inputs": [shared], "outputs": [{"name": one} for one in modules]}
        answer = client.post("/v2/models/s/infer", json=body)
        assert answer.status_code == (200 if status == 200 else 400), answer.text


def test_the_budget_is_a_sum_over_sets_whatever_fills_it(tmp_path):
    """400 bytes: a set of 160 is there, so 240 fit beside it and 244 do not."""
    app = create_app(Settings(store=str(tmp_path), memory_budget_bytes=400))
    store = app.state.store

    def upload(client, name, width):
        tensors = peft_tensors(rank=1, d_in=width - 1, d_out=1)
        files = {"adapter_config": json.dumps(peft_config(r=1))}
        files["adapter_model"] = safetensors.encode(tensors)
        return client.put(f"/v1/sets/{name}", files=files)

    def put(client, width, form):
        path, made = "/v1/sets/two/adapters/m", factors(rank=1, d_in=width - 1, d_out=1)
        if form == "new":
            body = {"d_in": width - 1, "d_out": 1, "config": {"rank": 1}}
            return client.put(path, json=body)
        if form == "json":
            return client.put(path, json={key: one.tolist() for key, one in made.items()})
        content = safetensors.encode(made)
        return client.put(path, content=content, headers={"Content-Type": BINARY})

    def create(client, width):
        body = {"name": "three", "config": {"rank": 1}}
        # Four modules of (n -> n): 4 * 2n numbers.
        body["attention"] = {"hidden_size": width // 8, "num_heads": 1}
        return client.post("/v1/sets", json=body)

    with serving(app) as url, httpx.Client(base_url=url) as client:
        assert upload(client, "one", 40).json()["total_memory_bytes"] == 160
        client.post("/v1/sets", json={"name": "two"})
        fills = {
            "upload": lambda width: upload(client, "three", width),
            "new": lambda width: put(client, width, "new"),
            "json": lambda width: put(client, width, "json"),
            "binary": lambda width: put(client, width, "binary"),
        }
        for name, fill in fills.items():
            before = snapshot(store)
            body = assert_problem(fill(61), 507, "memory_budget_exceeded")
            assert (body["held_bytes"], body["budget_bytes"]) == (160, 400), name
            assert body["needed_bytes"] == 244
            assert snapshot(store) == before
            answer = fill(60)
            assert answer.status_code == 201, (name, answer.text)
            assert client.get("/v1/stats").json()["total_memory_bytes"] == 400
            client.delete("/v1/sets/three")
            client.delete("/v1/sets/two/adapters/m")
        assert_problem(create(client, 64), 507, "memory_budget_exceeded")  # 256 bytes
        assert create(client, 56).status_code == 201  # 224 bytes
        client.delete("/v1/sets/three")
        # A replacement counts for what it replaces; a second module counts beside the first.
        assert upload(client, "one", 100).status_code == 200
        assert_problem(upload(client, "one", 101), 507, "memory_budget_exceeded")
        assert upload(client, "one", 40).status_code == 200
        assert put(client, 30, "json").status_code == 201
        path, made = "/v1/sets/two/adapters/n", factors(rank=1, d_in=30, d_out=1)
        over = client.put(path, json={key: one.tolist() for key, one in made.items()})
        assert_problem(over, 507, "memory_budget_exceeded")
        fitting = {"lora_A": [[1.0] * 29], "lora_B": [[1.0]]}
        assert client.put(path, json=fitting).status_code == 201
