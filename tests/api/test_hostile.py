"""Malformed bodies: always a 4xx with a code, and the sets are unchanged."""

import json

import numpy as np
import pytest
from conftest import DATA, assert_problem, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonsai_lora.formats import safetensors

CASES = json.loads((DATA / "hostile" / "safetensors.json").read_text())
BINARY = "application/vnd.safetensors"


def body_of(case):
    if "raw_hex" in case:
        return bytes.fromhex(case["raw_hex"])
    header = bytes.fromhex(case["header_hex"]) if "header_hex" in case else case["header"].encode()
    piece, times = case.get("repeat", ["", 0])
    header += (piece * times + case.get("tail", "")).encode()
    length = case.get("length", len(header))
    return length.to_bytes(8, "little") + header + bytes(case.get("data_bytes", 0))


@pytest.fixture
def small(client, store):
    body = {"name": "small", "config": {"rank": 1}, "attention": {"hidden_size": 2, "num_heads": 1}}
    assert client.post("/v1/sets", json=body).status_code == 201
    yield client, snapshot(store)


def test_the_corpus_is_not_empty():
    assert len(CASES) >= 40
    assert len({case["id"] for case in CASES}) == len(CASES)


def test_corpus(small, store):
    client, before = small
    for case in CASES:
        answer = client.post(
            "/v1/sets/small/adapters/q_proj/apply",
            content=body_of(case),
            headers={"Content-Type": BINARY},
        )
        assert answer.status_code == case["status"], (case, answer.text)
        assert_problem(answer, case["status"], case["code"])
    assert snapshot(store) == before


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed_json"),
        (b"{", 400, "malformed_json"),
        (b"\xff", 400, "malformed_json"),
        (b"[" * 100_000, 400, "malformed_json"),
        (b'{"inputs":' + b"[" * 1000 + b"]" * 1000 + b"}", 422, "invalid_request"),
        (b'{"inputs":[NaN,1]}', 422, "non_finite_input"),
        (b'{"inputs":[1,-Infinity]}', 422, "non_finite_input"),
        (b'{"inputs":[1e400,1]}', 422, "non_finite_input"),
        (b'{"inputs":[1e39,1]}', 422, "non_finite_input"),
        (b'{"inputs":[1' + b"0" * 400 + b",1]}", 422, "non_finite_input"),
        (b'{"inputs":[[1,2],[3]]}', 422, "ragged_input"),
        (b'{"inputs":[[1,2],3]}', 422, "invalid_request"),
        (b'{"inputs":[1,[2,3]]}', 422, "invalid_request"),
        (b'{"inputs":[[[1,2]]]}', 422, "invalid_request"),
        (b'{"inputs":["1","2"]}', 422, "invalid_request"),
        (b'{"inputs":[true,false]}', 422, "invalid_request"),
        (b'{"inputs":[1.5,true]}', 422, "invalid_request"),
        (b'{"inputs":[[1.5,2],[0,false]]}', 422, "invalid_request"),
        (b'{"inputs":[null,1]}', 422, "invalid_request"),
        (b'{"inputs":[{},1]}', 422, "invalid_request"),
        (b'{"inputs":"abc"}', 422, "invalid_request"),
        (b'{"inputs":null}', 422, "invalid_request"),
        (b'{"inputs":{}}', 422, "invalid_request"),
        (b'{"inputs":[]}', 422, "shape_mismatch"),
        (b'{"inputs":[[]]}', 422, "shape_mismatch"),
        (b'{"inputs":[[],[]]}', 422, "shape_mismatch"),
        (b'{"inputs":[1,2,3]}', 422, "shape_mismatch"),
        (b'{"inputs":[1]}', 422, "shape_mismatch"),
        (b'{"inputs":[1,2],"more":1}', 422, "invalid_request"),
        (b'{"input":[1,2]}', 422, "invalid_request"),
        (b"[1,2]", 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
    ],
)
def test_json_corpus(small, store, body, status, code):
    client, before = small
    answer = client.post(
        "/v1/sets/small/adapters/q_proj/apply",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    assert_problem(answer, status, code)
    assert snapshot(store) == before


def test_every_kind_of_json_number_is_accepted(small):
    client, _ = small
    for text in ("[1,2]", "[-0,1e-400]", "[18446744073709551615,-9223372036854775808]", "[1,2.5]"):
        answer = client.post(
            "/v1/sets/small/adapters/q_proj/apply",
            content=f'{{"inputs":{text}}}',
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"] == [0.0, 0.0]


VALID = safetensors.encode({"inputs": np.ones((3, 2), np.float32)})


@given(st.data())
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_mutated_bodies_never_cause_500(small, store, data):
    client, before = small
    body = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "length"]))
        place = data.draw(st.integers(0, max(0, len(body) - 1)))
        if kind == "flip" and body:
            body[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del body[place:]
        elif kind == "insert":
            body[place:place] = data.draw(st.binary(max_size=40))
        else:
            body[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    target = data.draw(st.sampled_from(["adapters/q_proj/apply", "apply", "adapters/q_proj/merge"]))
    answer = client.post(
        f"/v1/sets/small/{target}", content=bytes(body), headers={"Content-Type": BINARY}
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert_problem(answer, answer.status_code, answer.json()["code"])
    assert snapshot(store) == before


@pytest.mark.parametrize("size", [1 << 10, 1 << 16, 1 << 20])
def test_megabytes_of_noise(small, store, rng, size):
    """Ten megabytes of random bytes over all routes that read bodies."""
    client, before = small
    count = (10 << 20) // 3 // size or 1
    for index in range(min(count, 200)):
        content = rng.bytes(size)
        method, path, media = [
            ("POST", "/v1/sets", "application/json"),
            ("POST", "/v1/sets/small/adapters/q_proj/apply", "application/json"),
            ("POST", "/v1/sets/small/adapters/q_proj/apply", BINARY),
            ("POST", "/v1/sets/small/apply", BINARY),
            ("PUT", "/v1/sets/small/adapters/q_proj", BINARY),
            ("PUT", "/v1/sets/small", "multipart/form-data; boundary=x"),
            ("POST", "/v1/sets/small/adapters/q_proj/merge", BINARY),
        ][index % 7]
        answer = client.request(method, path, content=content, headers={"Content-Type": media})
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["code"]
    assert snapshot(store) == before
