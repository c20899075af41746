"""The Open Inference Protocol, spoken by NVIDIA's own client."""

import gzip
import json
import struct
import zlib

import httpx
import ml_dtypes
import numpy as np
import pytest
import reference
import tritonclient.http as triton
from conftest import TINY, read_tensors, serving, upload
from test_apply import DOWN, Q_PROJ, V_PROJ
from tritonclient.utils import InferenceServerException

from bonsai_lora.api.app import create_app

UP = "model.layers.0.mlp.up_proj"
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture
def loaded(client):
    """The service with the set `plain`, and a tritonclient of it."""
    upload(client, "plain", TINY / "plain")
    with triton.InferenceServerClient(str(client.base_url).removeprefix("http://")) as server:
        yield client, server


@pytest.fixture
def server(loaded):
    return loaded[1]


@pytest.fixture
def golden():
    return read_tensors(TINY / "plain" / "golden.safetensors")


def tensor(name, array, datatype="FP32", *, binary=True):
    made = triton.InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, binary_data=binary)


def names(*some):
    return np.array(some, dtype=np.object_)


def exact(client, module, x):
    """The outputs of /v1 for the same vectors."""
    body = {"inputs": x.astype(np.float32).tolist()}
    answer = client.post(f"/v1/sets/plain/adapters/{module}/apply", json=body)
    return np.array(answer.json()["outputs"], np.float32)


def refused(call, status, words):
    with pytest.raises(InferenceServerException, match=words) as caught:
        call()
    assert caught.value.status() == str(status), caught.value
    return caught.value.message()


def error_of(answer, status, words):
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"], answer.text
    assert answer.headers["content-type"] == "application/json"


def test_health_and_metadata(loaded):
    client, server = loaded
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready("plain")
    assert server.is_model_ready("plain", "1")
    assert not server.is_model_ready("plain", "2")
    assert not server.is_model_ready("nobody")
    about = server.get_server_metadata()
    assert about["name"] == "bonsai-lora"
    assert "binary_tensor_data" in about["extensions"]
    assert "system_shared_memory" not in about["extensions"]
    assert client.get("/v2/").json() == about
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"live": True, "ready": True}
    assert client.get("/v2/models/plain/ready").json() == {"name": "plain", "ready": True}


def test_a_set_is_a_model(server):
    model = server.get_model_metadata("plain")
    assert model["versions"] == ["1"]
    inputs = {one["name"]: one for one in model["inputs"]}
    outputs = {one["name"]: one for one in model["outputs"]}
    assert inputs[Q_PROJ] == {"name": Q_PROJ, "datatype": "FP32", "shape": [-1, 64]}
    assert outputs[Q_PROJ] == {"name": Q_PROJ, "datatype": "FP32", "shape": [-1, 128]}
    assert inputs.keys() - outputs.keys() == {"x"}
    assert server.get_model_metadata("plain", "1") == model
    config = server.get_model_config("plain", "1")
    assert (config["name"], config["max_batch_size"]) == ("plain", 0)
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert {one["name"] for one in config["input"]} == inputs.keys()
    assert {"name": Q_PROJ, "data_type": "TYPE_FP32", "dims": [-1, 128], "label_filename": ""} in (
        config["output"]
    )


def test_the_mixed_model_takes_sets_and_x(server):
    inputs = [("sets", "BYTES", [-1], False), ("x", "FP32", [-1, -1], True)]
    model, config = server.get_model_metadata("mixed"), server.get_model_config("mixed")
    assert model["inputs"] == [
        {"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape, _ in inputs
    ]
    assert model["outputs"] == config["output"] == []
    kinds = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}
    assert [
        (one["name"], one["data_type"], one["dims"], one["optional"]) for one in config["input"]
    ] == [(name, kinds[datatype], shape, optional) for name, datatype, shape, optional in inputs]


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_infer_agrees_with_apply(loaded, golden, sent, wanted):
    client, server = loaded
    modules = [Q_PROJ, DOWN]
    inputs = [tensor(one, golden[f"{one}.x"], binary=sent) for one in modules]
    outputs = None
    if wanted is not None:
        outputs = [triton.InferRequestedOutput(one, binary_data=wanted) for one in modules]
    result = server.infer("plain", inputs, outputs=outputs, request_id="a-1")
    response = result.get_response()
    assert (response["id"], response["model_name"]) == ("a-1", "plain")
    assert response["model_version"] == "1"
    assert [one["name"] for one in response["outputs"]] == modules
    for module in modules:
        got = result.as_numpy(module)
        assert reference.relative_error(got, golden[f"{module}.delta"].astype(float)) < 1e-6
        assert np.array_equal(got, exact(client, module, golden[f"{module}.x"]))


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [("FP32", "f4"), ("FP16", "f2"), ("FP64", "f8"), ("BF16", ml_dtypes.bfloat16)],
)
def test_binary_datatypes(loaded, golden, datatype, dtype):
    client, server = loaded
    x = golden[f"{Q_PROJ}.x"].astype(dtype)
    try:
        given = tensor(Q_PROJ, x, datatype)
    except InferenceServerException:  # clients before 2.70 cut bfloat16 out of float32 themselves
        given = tensor(Q_PROJ, x.astype(np.float32), datatype)
    got = server.infer("plain", [given]).as_numpy(Q_PROJ)
    assert np.array_equal(got, exact(client, Q_PROJ, x))


def test_x_feeds_the_requested_outputs(loaded, golden):
    client, server = loaded
    x = golden[f"{Q_PROJ}.x"]
    outputs = [triton.InferRequestedOutput(one) for one in (UP, V_PROJ)]
    result = server.infer("plain", [tensor("x", x)], outputs=outputs)
    for module in (UP, V_PROJ):
        assert np.array_equal(result.as_numpy(module), exact(client, module, x))
    fitting = {
        one["name"]
        for one in client.get("/v1/sets/plain/adapters").json()["adapters"]
        if one["d_in"] == 64
    }
    everything = server.infer("plain", [tensor("x", x)]).get_response()["outputs"]
    assert {one["name"] for one in everything} == fitting
    own = golden[f"{V_PROJ}.x"][: len(x)] * 2
    both = server.infer("plain", [tensor("x", x), tensor(V_PROJ, own)], outputs=outputs)
    assert np.array_equal(both.as_numpy(V_PROJ), exact(client, V_PROJ, own))
    assert np.array_equal(both.as_numpy(UP), exact(client, UP, x))


@pytest.mark.parametrize("sent", ["gzip", "deflate", None])
@pytest.mark.parametrize("given", ["gzip", "deflate", None])
def test_compression(loaded, golden, sent, given):
    client, server = loaded
    x = golden[f"{Q_PROJ}.x"]
    result = server.infer(
        "plain",
        [tensor(Q_PROJ, x)],
        request_compression_algorithm=sent,
        response_compression_algorithm=given,
    )
    assert np.array_equal(result.as_numpy(Q_PROJ), exact(client, Q_PROJ, x))
    assert result.get_response()["outputs"][0]["parameters"] == {"binary_data_size": 5 * 128 * 4}


def test_compressed_responses_have_content_encoding(loaded, golden):
    client, _ = loaded
    body = {"inputs": [{"name": Q_PROJ, "shape": [64], "datatype": "FP32", "data": [0.5] * 64}]}
    post = "/v2/models/plain/infer"
    for coding in ("gzip", "deflate"):
        answer = client.post(post, json=body, headers={"Accept-Encoding": coding})
        assert answer.headers["content-encoding"] == coding
        assert answer.json()["outputs"][0]["shape"] == [128]
    for several in ("gzip, deflate", "gzip, deflate, br", "identity", "br", "gzip;q=0"):
        answer = client.post(post, json=body, headers={"Accept-Encoding": several})
        assert "content-encoding" not in answer.headers


def test_raw_binary(client, rng):
    client.post("/v1/sets", json={"name": "one", "config": {"rank": 2}})
    a, b = rng.standard_normal((2, 6)), rng.standard_normal((3, 2))
    client.put("/v1/sets/one/adapters/q_proj", json={"lora_A": a.tolist(), "lora_B": b.tolist()})
    x = rng.standard_normal((4, 6)).astype(np.float32)
    answer = client.post("/v2/models/one/infer", content=x.tobytes(), headers={LENGTH: "0"})
    length = int(answer.headers[LENGTH])
    about = json.loads(answer.content[:length])
    assert about["outputs"][0]["shape"] == [4, 3]
    got = np.frombuffer(answer.content[length:], np.float32).reshape(4, 3)
    native = client.post("/v1/sets/one/adapters/q_proj/apply", json={"inputs": x.tolist()})
    assert np.array_equal(got, np.array(native.json()["outputs"], np.float32))
    answer = client.post("/v2/models/one/infer", content=b"12345", headers={LENGTH: "0"})
    error_of(answer, 400, "raw input has 5 bytes")
    client.put("/v1/sets/one/adapters/down_proj", json={"d_in": 8, "d_out": 2})
    answer = client.post("/v2/models/one/infer", content=x.tobytes(), headers={LENGTH: "0"})
    error_of(answer, 400, "one input width")
    client.delete("/v1/sets/one/adapters/down_proj")
    client.put("/v1/sets/one/adapters/v_proj", json={"d_in": 6, "d_out": 2})
    answer = client.post("/v2/models/one/infer", content=x.tobytes(), headers={LENGTH: "0"})
    assert len(json.loads(answer.content[: int(answer.headers[LENGTH])])["outputs"]) == 2


def test_scale_is_a_parameter(loaded, golden):
    client, server = loaded
    x = golden[f"{Q_PROJ}.x"]
    result = server.infer("plain", [tensor(Q_PROJ, x)], parameters={"scale": -0.5})
    expected = -0.5 * exact(client, Q_PROJ, x).astype(float)
    assert reference.relative_error(result.as_numpy(Q_PROJ), expected) < 1e-6


def test_reserved_parameters_change_nothing(loaded, golden):
    client, server = loaded
    x = golden[f"{Q_PROJ}.x"]
    result = server.infer(
        "plain", [tensor(Q_PROJ, x)], priority=2, timeout=1000, sequence_id=7, sequence_start=True
    )
    assert np.array_equal(result.as_numpy(Q_PROJ), exact(client, Q_PROJ, x))


def test_load_prepares_what_the_first_apply_would(app, loaded):
    _, server = loaded
    stored = app.state.store.read("plain")
    adapters = stored.lora_set.registry.adapters.values()
    assert not any(one.is_ready for one in adapters)
    server.load_model("plain")
    assert all(one.is_ready for one in adapters)
    server.unload_model("plain")
    assert app.state.store.read("plain") is not stored


@pytest.mark.parametrize("binary", [True, False])
def test_the_mixed_model(loaded, rng, binary):
    client, server = loaded
    client.post("/v1/sets", json={"name": "other", "config": {"rank": 3}})
    a, b = rng.standard_normal((3, 64)), rng.standard_normal((128, 3))
    path = f"/v1/sets/other/adapters/{Q_PROJ}"
    client.put(path, json={"lora_A": a.tolist(), "lora_B": b.tolist()})
    x = rng.standard_normal((4, 64)).astype(np.float32)
    stack = [{"set": "plain", "weight": 0.5}, {"set": "other"}]
    rows = ["plain", "", "other", json.dumps(stack)]
    body = {"module": Q_PROJ, "sets": ["plain", None, "other", stack], "inputs": x.tolist()}
    expected = np.array(client.post("/v1/apply", json=body).json()["outputs"], np.float32)
    sets = tensor("sets", names(*rows), "BYTES", binary=binary)
    own = server.infer("mixed", [sets, tensor(Q_PROJ, x)])
    assert np.array_equal(own.as_numpy(Q_PROJ), expected)
    assert not own.as_numpy(Q_PROJ)[1].any()
    shared = server.infer(
        "mixed", [sets, tensor("x", x)], outputs=[triton.InferRequestedOutput(Q_PROJ)]
    )
    assert np.array_equal(shared.as_numpy(Q_PROJ), expected)
    column = tensor("sets", names(*rows).reshape(4, 1), "BYTES", binary=binary)
    again = server.infer("mixed", [column, tensor(Q_PROJ, x)])
    assert np.array_equal(again.as_numpy(Q_PROJ), expected)
    assert server.is_model_ready("mixed", "1")
    assert {one["name"] for one in server.get_model_metadata("mixed")["inputs"]} == {"sets", "x"}
    refused(lambda: server.infer("mixed", [tensor(Q_PROJ, x)]), 400, "'sets'")
    refused(lambda: server.infer("mixed", [sets, tensor("x", x)]), 400, "no module")
    refused(lambda: server.infer("mixed", [sets, tensor(Q_PROJ, x[:3])]), 400, "3 rows")
    gone = tensor("sets", names("nobody", "", "", ""), "BYTES")
    refused(
        lambda: server.infer("mixed", [gone, tensor(Q_PROJ, x)]), 404, "unknown model: 'nobody'"
    )
    refused(lambda: server.infer("mixed", [tensor("sets", x), tensor(Q_PROJ, x)]), 400, "BYTES")


def test_dora(based):
    upload(based, "dora", TINY / "dora")
    golden = read_tensors(TINY / "dora" / "golden.safetensors")
    from test_merge import BASE

    x, y = golden[f"{Q_PROJ}.x"], golden[f"{Q_PROJ}.y"].astype(float)
    wx = (x.astype(float) @ BASE[f"{Q_PROJ}.weight"].astype(float).T).astype(np.float32)
    with triton.InferenceServerClient(str(based.base_url).removeprefix("http://")) as server:
        inputs = [tensor(Q_PROJ, x), tensor(f"{Q_PROJ}.base_outputs", wx)]
        got = server.infer("dora", inputs).as_numpy(Q_PROJ)
        assert reference.relative_error(got + wx, y) < 1e-6
        refused(lambda: server.infer("dora", inputs[:1]), 400, "DoRA")
        name = f"{Q_PROJ}.base_outputs"
        refused(lambda: server.infer("dora", inputs[1:]), 400, f"besides '{name}'")
        described = {one["name"]: one for one in server.get_model_metadata("dora")["inputs"]}
        assert described[name] == {"name": name, "datatype": "FP32", "shape": [-1, wx.shape[1]]}


def test_repository(loaded, golden):
    client, server = loaded
    index = {one["name"]: one for one in server.get_model_repository_index()}
    assert index.keys() == {"plain", "mixed"}
    assert (index["plain"]["version"], index["plain"]["state"]) == ("1", "READY")
    assert client.post("/v2/repository/index", json={"ready": True}).json() == list(index.values())
    server.unload_model("plain")
    states = {one["name"]: one["reason"] for one in server.get_model_repository_index()}
    assert "on disk" in states["plain"]
    assert client.get("/v1/sets/plain").status_code == 200
    server.unload_model("plain")
    server.load_model("plain")
    states = {one["name"]: one["reason"] for one in server.get_model_repository_index()}
    assert states["plain"] == ""
    server.unload_model("plain")
    x = golden[f"{Q_PROJ}.x"]
    got = server.infer("plain", [tensor(Q_PROJ, x)]).as_numpy(Q_PROJ)
    assert np.array_equal(got, exact(client, Q_PROJ, x))
    refused(lambda: server.load_model("nobody"), 404, "unknown model: 'nobody'")
    refused(lambda: server.unload_model("nobody"), 404, "unknown model: 'nobody'")
    refused(lambda: server.load_model("plain", config="{}"), 501, "PUT /v1/sets")


def test_sets_are_preloaded_before_the_service_is_ready(settings):
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        upload(client, "plain", TINY / "plain").raise_for_status()
    known = settings.model_copy(update={"preload": ("plain", "absent")})
    with serving(create_app(known)) as url, httpx.Client(base_url=url) as client:
        (index,) = [
            one for one in client.post("/v2/repository/index").json() if one["name"] == "plain"
        ]
    assert index["reason"] == "", "it is in memory before anyone used it"


def test_statistics_add_up(loaded, golden):
    _, server = loaded
    before = server.get_inference_statistics("plain")["model_stats"][0]
    assert before["inference_count"] == before["execution_count"] == before["last_inference"] == 0
    x = golden[f"{Q_PROJ}.x"]
    for _ in range(3):
        server.infer("plain", [tensor(Q_PROJ, x)])
    refused(lambda: server.infer("plain", [tensor(Q_PROJ, x[:, :3])]), 400, "unexpected shape")
    stats = server.get_inference_statistics("plain", "1")["model_stats"][0]
    assert (stats["name"], stats["version"]) == ("plain", "1")
    assert stats["inference_count"] == 3 * len(x)
    assert stats["execution_count"] == 3
    times = stats["inference_stats"]
    assert times["success"]["count"] == times["compute_infer"]["count"] == 3
    assert times["fail"]["count"] == 1
    parts = sum(times[f"compute_{one}"]["ns"] for one in ("input", "infer", "output"))
    assert 0 < parts + times["queue"]["ns"] <= times["success"]["ns"]
    assert stats["last_inference"] > 1.7e12
    assert stats["memory_usage"][0]["byte_size"] > 0
    everything = {one["name"]: one for one in server.get_inference_statistics()["model_stats"]}
    assert everything.keys() == {"plain", "mixed"}
    assert everything["plain"]["inference_stats"] == times


def test_statistics_restart_when_a_set_changes(loaded, golden):
    client, server = loaded
    inputs = [tensor(Q_PROJ, golden[f"{Q_PROJ}.x"])]
    server.infer("plain", inputs)
    upload(client, "plain", TINY / "plain")
    stats = server.get_inference_statistics("plain")["model_stats"][0]
    assert (stats["version"], stats["execution_count"]) == ("2", 0)
    server.infer("plain", inputs)
    assert server.get_inference_statistics("plain")["model_stats"][0]["execution_count"] == 1


def test_error_texts_are_close_to_tritons(server, golden):
    x = golden[f"{Q_PROJ}.x"]
    good = [tensor(Q_PROJ, x)]
    refused(lambda: server.infer("nobody", good), 404, "Request for unknown model: 'nobody'")
    refused(lambda: server.infer("plain", good, model_version="7"), 404, "version 7 is not found")
    refused(
        lambda: server.infer("plain", [tensor("foo", x)]), 400, "unexpected inference input 'foo'"
    )
    outputs = [triton.InferRequestedOutput("foo")]
    refused(
        lambda: server.infer("plain", good, outputs=outputs),
        400,
        "unexpected inference output 'foo'",
    )
    refused(
        lambda: server.infer("plain", [tensor(Q_PROJ, x.astype(np.int32), "INT32")]),
        400,
        "data-type is 'INT32'",
    )
    refused(lambda: server.infer("plain", [tensor(Q_PROJ, x[:, :9])]), 400, r"Expected \[-1,64\]")
    refused(
        lambda: server.infer("plain", [tensor("x", x[:, :9])]),
        400,
        r"unexpected shape for input 'x'",
    )
    half = x.astype(np.float16)
    refused(
        lambda: server.infer("plain", [tensor(Q_PROJ, half, "FP16", binary=False)]),
        400,
        "FP16 data via JSON is not supported",
    )
    bad = x.copy()
    bad[1, 2] = np.inf
    refused(lambda: server.infer("plain", [tensor(Q_PROJ, bad)]), 400, r"\[1\]\[2\]")
    outputs = [triton.InferRequestedOutput(Q_PROJ, class_count=3)]
    refused(lambda: server.infer("plain", good, outputs=outputs), 400, "classification")
    refused(server.get_system_shared_memory_status, 501, "--shared-memory")
    refused(server.get_cuda_shared_memory_status, 404, "there is no resource")


def test_inputs_that_feed_no_output(loaded, golden):
    client, server = loaded
    x = golden[f"{Q_PROJ}.x"]
    asked = [triton.InferRequestedOutput(Q_PROJ)]
    extra = [tensor(Q_PROJ, x), tensor(V_PROJ, x)]
    refused(lambda: server.infer("plain", extra, outputs=asked), 400, "feeds none")
    extra = [tensor(Q_PROJ, x), tensor("x", x)]
    refused(lambda: server.infer("plain", extra, outputs=asked), 400, "'x' feeds none")
    refused(lambda: server.infer("plain", [tensor(Q_PROJ, x), tensor("x", x[:, :9])]), 400, "'x'")
    sets = tensor("sets", names(*["plain"] * len(x)), "BYTES")
    for more in ("v_prjo", "x", "zzz.base_outputs"):
        inputs = [sets, tensor(Q_PROJ, x), tensor(more, x)]
        refused(lambda some=inputs: server.infer("mixed", some, outputs=asked), 400, "feeds none")
    assert (
        client.post("/v2/models/mixed/infer", content=b"", headers={LENGTH: "0"}).status_code == 400
    )


def test_an_id_may_be_null(loaded):
    client, _ = loaded
    body = {"id": None, "inputs": [described(data=[0.5] * 64)]}
    answer = client.post("/v2/models/plain/infer", json=body)
    assert "id" not in answer.json()


def test_the_scale_is_bounded_like_every_scale(loaded):
    client, _ = loaded
    for scale in (1e7, -1e7, 1e400, "2", True, None):
        text = json.dumps({"inputs": [described(data=[0.5] * 64)], "parameters": {"scale": scale}})
        answer = client.post("/v2/models/plain/infer", content=text.replace("Infinity", "1e400"))
        error_of(answer, 400, "scale")


def described(**changes):
    return {"name": Q_PROJ, "shape": [1, 64], "datatype": "FP32", **changes}


def sized(size, **changes):
    return described(parameters={"binary_data_size": size}, **changes)


HOSTILE = {
    "no JSON": (b"{", None, "not JSON"),
    "no object": ([], None, "JSON object"),
    "no inputs": ({}, None, "'inputs'"),
    "inputs no list": ({"inputs": {}}, None, "'inputs'"),
    "inputs of numbers": ({"inputs": [1]}, None, "'inputs'"),
    "no input at all": ({"inputs": []}, None, "has no input for model"),
    "no name": ({"inputs": [{"shape": [1], "datatype": "FP32", "data": [1]}]}, None, "name"),
    "no shape": ({"inputs": [{"name": Q_PROJ, "datatype": "FP32", "data": [1]}]}, None, "shape"),
    "negative shape": ({"inputs": [described(shape=[-1, 64], data=[])]}, None, "shape"),
    "boolean shape": ({"inputs": [described(shape=[True, 64], data=[])]}, None, "shape"),
    "huge shape": ({"inputs": [sized(0, shape=[2**40, 2**40])]}, b"", "unexpected shape"),
    "shape of overflow": ({"inputs": [sized(0, shape=[2**47, 64])]}, b"", "rows"),
    "no data": ({"inputs": [described()]}, None, "exactly one"),
    "data twice": ({"inputs": [sized(4, data=[1])]}, b"1234", "exactly one"),
    "data no list": ({"inputs": [described(data="x")]}, None, "list"),
    "too few numbers": ({"inputs": [described(data=[1.0] * 63)]}, None, "shape"),
    "ragged": ({"inputs": [described(data=[[1.0, 2.0], [1.0]])]}, None, "row 1"),
    "text in data": ({"inputs": [described(data=["a"] * 64)]}, None, "number"),
    "boolean in data": ({"inputs": [described(data=[True] * 64)]}, None, "boolean"),
    "lying size": ({"inputs": [sized(256)]}, bytes(100), "256 bytes"),
    "size too small": ({"inputs": [sized(100)]}, bytes(256), "156 bytes more"),
    "size that fits nothing": ({"inputs": [sized(252)]}, bytes(252), "Expected 256"),
    "negative size": ({"inputs": [sized(-4)]}, bytes(4), "binary_data_size"),
    "fractional size": ({"inputs": [sized(1.5)]}, bytes(4), "binary_data_size"),
    "huge size": ({"inputs": [sized(2**62)]}, bytes(4), "binary data"),
    "beyond 64 bits": ({"inputs": [sized(2**70)]}, bytes(4), "binary_data_size"),
    "additional data": ({"inputs": [sized(256)]}, bytes(260), "4 bytes more"),
    "input twice": ({"inputs": [sized(256), sized(256)]}, bytes(512), "twice"),
    "output twice": (
        {"inputs": [sized(256)], "outputs": [{"name": Q_PROJ}, {"name": Q_PROJ}]},
        bytes(256),
        "twice",
    ),
    "output no object": ({"inputs": [sized(256)], "outputs": ["x"]}, bytes(256), "'outputs'"),
    "parameters no object": ({"inputs": [described(parameters=3, data=[])]}, None, "parameters"),
    "flag no boolean": (
        {"inputs": [sized(256)], "parameters": {"binary_data_output": 1}},
        bytes(256),
        "binary_data_output",
    ),
    "scale no number": (
        {"inputs": [sized(256)], "parameters": {"scale": "2"}},
        bytes(256),
        "scale",
    ),
    "id no string": ({"inputs": [sized(256)], "id": 1}, bytes(256), "id"),
    "bytes for floats": ({"inputs": [sized(8, datatype="BYTES")]}, bytes(8), "BYTES"),
    "three dimensions": (
        {"inputs": [sized(256, shape=[1, 1, 64])]},
        bytes(256),
        "unexpected shape",
    ),
    "no dimension": ({"inputs": [sized(4, shape=[])]}, bytes(4), "unexpected shape"),
    "region without size": (
        {"inputs": [described(parameters={"shared_memory_region": "r"})]},
        None,
        "shared_memory_byte_size",
    ),
    "region and data": (
        {
            "inputs": [
                described(
                    parameters={
                        "shared_memory_region": "r",
                        "shared_memory_byte_size": 4,
                        "binary_data_size": 4,
                    }
                )
            ]
        },
        bytes(4),
        "both",
    ),
}


@pytest.mark.parametrize("case", list(HOSTILE), ids=lambda case: case.replace(" ", "-"))
def test_hostile_requests(loaded, case):
    client, _ = loaded
    header, data, words = HOSTILE[case]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    headers = {} if data is None else {LENGTH: str(len(text))}
    answer = client.post("/v2/models/plain/infer", content=text + (data or b""), headers=headers)
    error_of(answer, 400, words)


@pytest.mark.parametrize("length", ["-1", "1e3", "99999", "x", "", "1" * 30])
def test_hostile_header_lengths(loaded, length):
    client, _ = loaded
    answer = client.post("/v2/models/plain/infer", content=b"{}", headers={LENGTH: length})
    error_of(answer, 400, LENGTH)


def with_sets(data, shape):
    header = {
        "inputs": [
            {
                "name": "sets",
                "shape": shape,
                "datatype": "BYTES",
                "parameters": {"binary_data_size": len(data)},
            },
            described(data=[1.0] * 64),
        ]
    }
    text = json.dumps(header).encode()
    return {"content": text + data, "headers": {LENGTH: str(len(text))}}


@pytest.mark.parametrize(
    ("data", "shape", "words"),
    [
        (b"\x05\x00\x00\x00plai", [1], "truncated"),
        (b"\x05\x00", [1], "truncated"),
        (struct.pack("<I", 2**32 - 1) + b"plain", [1], "truncated"),
        (struct.pack("<I", 1) + b"\xff", [1], "UTF-8"),
        (struct.pack("<I", 5) + b"plain", [2], "1 elements"),
        (struct.pack("<I", 5) + b"plain", [1, 2], "shape"),
        (struct.pack("<I", 1) + b"[", [1], "JSON"),
        (b"", [0], "rows"),
    ],
)
def test_hostile_names(loaded, data, shape, words):
    client, _ = loaded
    error_of(client.post("/v2/models/mixed/infer", **with_sets(data, shape)), 400, words)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_hostile_compression(loaded, coding):
    client, _ = loaded
    pack = gzip.compress if coding == "gzip" else zlib.compress
    limit = 64 << 20
    bomb = pack(bytes(limit + 1))
    post, headers = "/v2/models/plain/infer", {"Content-Encoding": coding}
    error_of(client.post(post, content=bomb, headers=headers), 400, "more than the limit")
    good = pack(json.dumps({"inputs": [described(data=[1.0] * 64)]}).encode())
    assert client.post(post, content=good, headers=headers).status_code == 200
    error_of(client.post(post, content=good[:-5], headers=headers), 400, "truncated")
    error_of(client.post(post, content=b"nonsense", headers=headers), 400, coding)
    error_of(client.post(post, content=good + b"junk", headers=headers), 400, coding)
    error_of(client.post(post, content=b"", headers=headers), 400, "truncated")
    other = client.post(post, content=good, headers={"Content-Encoding": "br"})
    error_of(other, 400, "Content-Encoding")


def test_other_paths_and_methods(loaded):
    client, _ = loaded
    error_of(client.get("/v2/nothing"), 404, "there is no resource")
    error_of(client.get("/v2/models/plain/versions/7/config"), 404, "version 7")
    answer = client.get("/v2/models/plain/infer")
    error_of(answer, 405, "POST")
    assert answer.headers["allow"] == "POST"
    error_of(client.post("/v2/repository/index", content=b"{"), 400, "JSON")


def test_a_limit_on_the_json(settings):
    from conftest import serving

    from bonsai_lora.api.app import create_app

    app = create_app(settings.model_copy(update={"max_json_bytes": 1000, "max_body_bytes": 5000}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/sets", json={"name": "s"})
        post = "/v2/models/s/infer"
        error_of(client.post(post, content=b" " * 1001), 400, "1001 bytes")
        error_of(client.post(post, content=b" " * 5001), 400, "5001 bytes")


def test_shapes_of_many_dimensions_cost_nothing(loaded):
    client, _ = loaded
    body = {"inputs": [described(shape=[2**48 - 1] * 80_000, data=[])]}
    error_of(client.post("/v2/models/plain/infer", json=body), 400, "80000 dimensions")


def test_many_members_and_many_names_cost_nothing(loaded):
    client, _ = loaded
    post = "/v2/models/plain/infer"
    members = gzip.compress(b"") * 100_000
    error_of(
        client.post(post, content=members, headers={"Content-Encoding": "gzip"}),
        400,
        "after its end",
    )
    header = {"name": "sets", "shape": [3], "datatype": "BYTES"}
    header["parameters"] = {"binary_data_size": 60 << 20}
    text = json.dumps({"inputs": [header, described(data=[1.0] * 64)]}).encode()
    packed = gzip.compress(text + bytes(60 << 20))
    headers = {"Content-Encoding": "gzip", LENGTH: str(len(text))}
    answer = client.post("/v2/models/mixed/infer", content=packed, headers=headers)
    error_of(answer, 400, "more than 3 elements")


def test_lone_surrogates_are_refused(loaded):
    client, _ = loaded
    for text in (
        '{"id": "\\ud800", "inputs": []}',
        '{"inputs": [{"name": "sets", "shape": [1], "datatype": "BYTES", "data": ["[\\ud800"]}]}',
    ):
        error_of(client.post("/v2/models/mixed/infer", content=text), 400, "JSON")


def test_late_counts_do_not_erase_newer_ones(tmp_path):
    from bonsai_lora.storage.counts import CountFile, Counts

    counts = CountFile(tmp_path)
    one = Counts(success_count=1, rows=2)
    counts.add("s", "a-1", "2026-01-01", one)
    counts.add("s", "a-2", "2026-01-02", one)
    counts.add("s", "a-1", "2026-01-01", one)
    counts.add("s", "a-2", "2026-01-02", one)
    assert counts.read({"s": "a-2"})["s"].rows == 4
    for number in range(3000):  # grows beyond its first rows
        counts.add(f"t{number}", "b", "", one)
    found = counts.read({f"t{number}": "b" for number in range(3000)})
    assert {total.success_count for total in found.values()} == {1}
