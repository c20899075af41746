import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import TINY, assert_problem, snapshot, upload

from bonsai_lora.core.kaiming import kaiming_uniform
from bonsai_lora.formats import safetensors

BINARY = "application/vnd.safetensors"


@pytest.fixture
def empty(client):
    body = {"name": "s", "config": {"rank": 2, "alpha": 6.0}}
    assert client.post("/v1/sets", json=body).status_code == 201
    return client


def test_initialize(empty, store):
    answer = empty.put("/v1/sets/s/adapters/q_proj", json={"d_in": 8, "d_out": 4})
    assert answer.status_code == 201
    assert answer.json()["rank"] == 2
    assert answer.json()["scaling"] == 3.0
    own = {"d_in": 8, "d_out": 4, "config": {"rank": 3, "alpha": 3.0}}
    answer = empty.put("/v1/sets/s/adapters/q_proj", json=own)
    assert answer.status_code == 200
    assert answer.json()["rank"] == 3
    stored = store.read("s")
    assert stored.record.version == 3
    assert stored.record.origin == "initialized"
    assert np.array_equal(stored.lora_set.registry.get("q_proj").a_matrix, kaiming_uniform(8, 4, 3))


def test_weights_as_json(empty, rng):
    a_matrix = rng.standard_normal((2, 5)).astype(np.float32)
    b_matrix = rng.standard_normal((3, 2)).astype(np.float32)
    body = {"lora_A": a_matrix.tolist(), "lora_B": b_matrix.tolist()}
    answer = empty.put("/v1/sets/s/adapters/m", json=body)
    assert answer.status_code == 201
    assert answer.json()["scaling"] == 3.0  # the set's alpha 6 over rank 2
    assert empty.get("/v1/sets/s").json()["origin"] == "mixed"
    body["alpha"] = 1.0
    assert empty.put("/v1/sets/s/adapters/m", json=body).json()["scaling"] == 0.5
    x = rng.standard_normal((4, 5)).astype(np.float32)
    out = empty.post("/v1/sets/s/adapters/m/apply", json={"inputs": x.tolist()}).json()
    expected = reference.apply(a_matrix, b_matrix, 0.5, x)
    assert reference.relative_error(np.array(out["outputs"]), expected) < 1e-6
    assert out["version"] == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_as_safetensors_keep_their_bits(empty, rng, dtype):
    tensors = {
        "lora_A": rng.standard_normal((2, 5)).astype(dtype),
        "lora_B": rng.standard_normal((3, 2)).astype(dtype),
    }
    answer = empty.put(
        "/v1/sets/s/adapters/m?alpha=4",
        content=safetensors.encode(tensors),
        headers={"Content-Type": BINARY},
    )
    assert answer.status_code == 201
    assert answer.json()["scaling"] == 2.0
    exported, _ = safetensors.decode(empty.get("/v1/sets/s/adapter_model.safetensors").content)
    for half in "AB":
        got = exported[f"base_model.model.m.lora_{half}.weight"]
        assert got.dtype == dtype
        assert got.tobytes() == tensors[f"lora_{half}"].tobytes()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "invalid_request"),
        ({"d_in": 4}, 422, "invalid_request"),
        ({"d_in": -4, "d_out": 1}, 422, "invalid_request"),
        ({"d_in": 4, "d_out": 4, "lora_A": [[1]]}, 422, "invalid_request"),
        ({"lora_A": [[1, 2]]}, 422, "invalid_request"),
        ({"lora_A": [[1, 2]], "lora_B": [[1, 2]]}, 422, "shape_mismatch"),
        ({"lora_A": [1, 2], "lora_B": [[1]]}, 422, "shape_mismatch"),
        ({"lora_A": [[1, 2], [3]], "lora_B": [[1]]}, 422, "ragged_input"),
        ({"lora_A": [["x"]], "lora_B": [[1]]}, 422, "invalid_request"),
        ({"lora_A": [[1]], "lora_B": [[1]], "alpha": "2"}, 422, "invalid_request"),
        ({"lora_A": [[1]], "lora_B": [[1]], "alpha": True}, 422, "invalid_request"),
        ({"lora_A": [[1]], "lora_B": [[1]], "alpha": 1e39}, 422, "invalid_request"),
        ({"lora_A": [[1]] * 2000, "lora_B": [[1] * 2000]}, 422, "rank_too_large"),
        ({"d_in": 4, "d_out": 4, "config": {"rank": 5000}}, 422, "rank_too_large"),
        ({"d_in": 2**31 - 1, "d_out": 2**31 - 1, "config": {"rank": 1000}}, 507, "memory_budget_exceeded"),
    ],
)  # fmt: skip
def test_wrong_adapters_change_nothing(empty, store, body, status, code):
    before = snapshot(store)
    assert_problem(empty.put("/v1/sets/s/adapters/m", json=body), status, code)
    assert snapshot(store) == before


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (np.nan, np.float32, "has NaN or infinity"),
        (-np.inf, ml_dtypes.bfloat16, "has NaN or infinity"),
        (1.0, np.float64, "is F64; expected F32, F16 or BF16"),
    ],
)
def test_weights_that_no_set_can_have_change_nothing(empty, store, half, value, dtype, words):
    tensors = {"lora_A": np.ones((2, 5), np.float32), "lora_B": np.ones((3, 2), np.float32)}
    tensors[half] = tensors[half].astype(dtype)
    tensors[half][1, 1] = value
    before = snapshot(store)
    body, headers = safetensors.encode(tensors), {"Content-Type": BINARY}
    answer = empty.put("/v1/sets/s/adapters/m", content=body, headers=headers)
    problem = assert_problem(answer, 422, "invalid_adapter")
    assert problem["detail"].startswith(f"{half} {words}")
    assert problem["field"] == half
    assert snapshot(store) == before


@pytest.mark.parametrize("name", ["a..b", ".a", "a.", "x" * 257, "a b"])
def test_wrong_module_names(empty, name):
    answer = empty.put(f"/v1/sets/s/adapters/{name}", json={"d_in": 1, "d_out": 1})
    assert_problem(answer, 422, "invalid_name")


def test_delete(client):
    upload(client, "plain", TINY / "plain")
    module = "model.layers.0.self_attn.q_proj"
    assert client.delete(f"/v1/sets/plain/adapters/{module}").status_code == 204
    assert_problem(client.get(f"/v1/sets/plain/adapters/{module}"), 404, "module_not_found")
    info = client.get("/v1/sets/plain").json()
    assert info["version"] == 2
    assert info["adapter_count"] == 13
    assert_problem(client.delete(f"/v1/sets/plain/adapters/{module}"), 404, "module_not_found")
    listed = client.get("/v1/sets/plain/adapters").json()["adapters"]
    assert listed == info["modules"]


def test_media_types(empty):
    answer = empty.put("/v1/sets/s/adapters/m", content=b"x", headers={"Content-Type": "text/csv"})
    assert_problem(answer, 415, "unsupported_media_type")
