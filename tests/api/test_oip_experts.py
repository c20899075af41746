"""Fused experts through the Open Inference Protocol give what /v1 gives."""

import shutil

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from conftest import serving, upload
from test_experts import EXPERTS, MOE
from test_oip import error_of, names, tensor
from test_shared_memory import memory, placed, shm

from bonsai_lora import Client
from bonsai_lora.api.app import create_app

GATE_UP = f"{EXPERTS}.base_layer"
Q_PROJ = "model.layers.0.self_attn.q_proj"
NUMBERS = [1, 2, 0, 1]


@pytest.fixture
def local(settings, tmp_path):
    """A service with shared memory and two sets with fused experts, and a tritonclient of it."""
    shutil.copytree(MOE / "base", tmp_path / "bases" / "moe")
    known = {"shared_memory": True, "bases": str(tmp_path / "bases")}
    app = create_app(settings.model_copy(update=known))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        upload(client, "s", MOE / "peft-0.21")
        upload(client, "t", MOE / "peft-0.18")
        with triton.InferenceServerClient(url.removeprefix("http://")) as server:
            yield client, server


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 8)).astype(np.float32)


def native(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"]


def equal(got, expected):
    return np.array_equal(got, np.array(expected, np.float32))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("datatype", "dtype"), [("INT32", np.int32), ("INT64", np.int64)])
def test_each_row_goes_through_its_expert(local, x, binary, datatype, dtype):
    client, server = local
    numbers = tensor("experts", np.array(NUMBERS, dtype), datatype, binary=binary)
    result = server.infer("s", [tensor(GATE_UP, x, binary=binary), numbers])
    expected = native(
        client, f"/v1/sets/s/adapters/{GATE_UP}/apply", inputs=x.tolist(), experts=NUMBERS
    )
    assert equal(result.as_numpy(GATE_UP), expected)
    assert np.any(expected[0])
    shared = [tensor("x", x, binary=binary), numbers]
    wanted = [triton.InferRequestedOutput(one) for one in (GATE_UP, Q_PROJ)]
    result = server.infer("s", shared, outputs=wanted)
    assert equal(result.as_numpy(GATE_UP), expected)
    alone = native(client, f"/v1/sets/s/adapters/{Q_PROJ}/apply", inputs=x.tolist())
    assert equal(result.as_numpy(Q_PROJ), alone)


def test_experts_of_mixed_rows(local, x):
    client, server = local
    sets = ["s", "t", "", "t"]
    numbers = tensor("experts", np.array(NUMBERS), "INT64")
    result = server.infer(
        "mixed", [tensor("sets", names(*sets), "BYTES"), tensor(GATE_UP, x), numbers]
    )
    mixed = {"module": GATE_UP, "sets": [one or None for one in sets]}
    expected = native(client, "/v1/apply", **mixed, inputs=x.tolist(), experts=NUMBERS)
    assert equal(result.as_numpy(GATE_UP), expected)


def test_experts_in_shared_memory(local, x):
    client, server = local
    numbers = np.array(NUMBERS, np.int32)
    with memory(4096) as (handle, key):
        server.register_system_shared_memory("r", key, 4096)
        shm.set_shared_memory_region(handle, [x, numbers])
        given = [placed(GATE_UP, x, "r"), placed("experts", numbers, "r", x.nbytes, "INT32")]
        got = server.infer("s", given).as_numpy(GATE_UP)
    path = f"/v1/sets/s/adapters/{GATE_UP}/apply"
    assert equal(got, native(client, path, inputs=x.tolist(), experts=NUMBERS))


def test_the_client_library_sends_experts(local, x):
    client, _ = local
    with Client(str(client.base_url)) as ours:
        inferred = ours.infer("s", {GATE_UP: x, "experts": NUMBERS})
        expected = ours.apply("s", GATE_UP, x, experts=NUMBERS)
    assert np.array_equal(inferred.outputs[GATE_UP], expected.outputs)


def test_metadata_names_experts_where_there_are_some(local):
    client, server = local
    numbers = {"name": "experts", "datatype": "INT64", "shape": [-1]}
    assert numbers in server.get_model_metadata("s")["inputs"]
    [about] = [one for one in server.get_model_config("s")["input"] if one["name"] == "experts"]
    assert (about["data_type"], about["dims"], about["optional"]) == ("TYPE_INT64", [-1], True)
    client.post("/v1/sets", json={"name": "plain", "config": {"rank": 1}})
    client.put("/v1/sets/plain/adapters/q", json={"d_in": 2, "d_out": 2})
    for model in ("plain", "mixed"):
        assert numbers not in server.get_model_metadata(model)["inputs"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "has 3 fused experts; send `experts`"),
        ({"data": [0]}, "has data of length 1, but its shape is [2]"),
        ({"data": [0], "shape": [1]}, "2 rows"),
        ({"data": [0, 3]}, "experts[1] is 3"),
        ({"data": [0, -1]}, "experts[1] is -1"),
        ({"data": [0, 1.0]}, "expected a list with the number of an expert"),
        ({"data": [0, True]}, "expected a list with the number of an expert"),
        ({"data": [0, 2**63]}, "beyond 64 bits"),
        ({"data": [[0], [1]]}, "expected a list with the number of an expert"),
        ({"shape": [2, 1]}, "unexpected shape [2,1] for input 'experts'; expected [rows]"),
        ({"datatype": "FP32"}, "data-type is 'FP32'; expected 'INT32' or 'INT64'"),
        ({"datatype": "INT8"}, "data-type is 'INT8'; expected 'INT32' or 'INT64'"),
        ({"data": None, "parameters": {"binary_data_size": 0}}, "Expected 16 for shape [2]"),
    ],
)
def test_wrong_experts(local, changed, words):
    client, _ = local
    rows = {"name": EXPERTS, "shape": [2, 6], "datatype": "FP32", "data": [0.0] * 12}
    numbers = {"name": "experts", "shape": [2], "datatype": "INT64", "data": [0, 1]}
    inputs = [rows] if changed is None else [rows, numbers | changed]
    error_of(client.post("/v2/models/s/infer", json={"inputs": inputs}), 400, words)


def test_experts_of_modules_that_have_none(local, x):
    client, _ = local
    rows = {"name": Q_PROJ, "shape": [4, 8], "datatype": "FP32", "data": x.tolist()}
    numbers = {"name": "experts", "shape": [4], "datatype": "INT64", "data": NUMBERS}
    answer = client.post("/v2/models/s/infer", json={"inputs": [rows, numbers]})
    error_of(answer, 400, "is not fused; remove experts")
