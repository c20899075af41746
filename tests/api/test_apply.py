import json

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import TINY, assert_problem, read_tensors, upload

from bonsai_lora.formats import safetensors

BINARY = "application/vnd.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"
V_PROJ = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.1.mlp.down_proj"


def post(client, path, tensors, **options):
    headers = {"Content-Type": BINARY, **options.pop("headers", {})}
    return client.post(path, content=safetensors.encode(tensors), headers=headers, **options)


def decoded(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == BINARY
    return safetensors.decode(answer.content)[0]


@pytest.mark.parametrize("adapter", ["plain", "attention-only", "rslora-patterns"])
def test_every_module_agrees_with_what_torch_computed(client, adapter):
    upload(client, adapter, TINY / adapter)
    golden = read_tensors(TINY / adapter / "golden.safetensors")
    modules = [key.removesuffix(".delta") for key in golden if key.endswith(".delta")]
    assert len(modules) == client.get(f"/v1/sets/{adapter}").json()["adapter_count"]
    for module in modules:
        x, delta = golden[f"{module}.x"], golden[f"{module}.delta"].astype(np.float64)
        path = f"/v1/sets/{adapter}/adapters/{module}/apply"
        answer = client.post(path, json={"inputs": x.tolist()}).json()
        assert (answer["set"], answer["module"], answer["version"]) == (adapter, module, 1)
        as_json = np.array(answer["outputs"], np.float32)
        as_binary = decoded(post(client, path, {"inputs": x}))["outputs"]
        assert np.array_equal(as_json, as_binary)
        assert reference.relative_error(as_binary, delta) < 1e-6


def test_one_vector_in_one_vector_out(plain):
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    vector = np.arange(64, dtype=np.float32)
    one = plain.post(path, json={"inputs": vector.tolist()}).json()["outputs"]
    batch = plain.post(path, json={"inputs": [vector.tolist()]}).json()["outputs"]
    assert np.array(one).shape == (128,)
    assert np.array(batch).shape == (1, 128)
    assert decoded(post(plain, path, {"inputs": vector}))["outputs"].shape == (128,)


def test_json_prints_the_shortest_decimals_of_float32(plain):
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    text = plain.post(path, json={"inputs": x.tolist()}).text
    numbers = json.loads(text, parse_float=str)["outputs"]
    exact = decoded(post(plain, path, {"inputs": x}))["outputs"]
    for row, expected in zip(numbers, exact, strict=True):
        for got, value in zip(row, expected, strict=True):
            assert np.float32(got) == value
            digits = got.lstrip("-").split("e")[0].replace(".", "").strip("0")
            assert len(digits) <= len(
                str(value).lstrip("-").split("e")[0].replace(".", "").strip("0")
            )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_inputs_of_every_float_dtype(plain, dtype):
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
    x = np.random.default_rng(2).standard_normal((4, 64)).astype(kinds[dtype])
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    got = decoded(post(plain, path, {"inputs": x}))["outputs"]
    expected = decoded(post(plain, path, {"inputs": x.astype(np.float32)}))["outputs"]
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_outputs_in_sixteen_bits(plain, dtype, kind):
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    full = decoded(post(plain, path, {"inputs": x}))["outputs"]
    half = decoded(post(plain, f"{path}?dtype={dtype}", {"inputs": x}))["outputs"]
    assert half.dtype == kind
    assert half.tobytes() == full.astype(kind).tobytes()


def test_accept_selects_the_form(plain):
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    x = np.ones((1, 64), np.float32)
    for accept in (BINARY, "application/safetensors", f"text/html, {BINARY};q=0.5"):
        answer = plain.post(path, json={"inputs": x.tolist()}, headers={"Accept": accept})
        assert decoded(answer)["outputs"].shape == (1, 128)
    for accept in ("application/json", "application/json, application/*;q=0.1"):
        answer = post(plain, path, {"inputs": x}, headers={"Accept": accept})
        assert answer.headers["content-type"] == "application/json"
    for accept in ("*/*", "application/*", "text/html,*/*;q=0.8"):
        answer = post(plain, path, {"inputs": x}, headers={"Accept": accept})
        assert answer.headers["content-type"] == BINARY
    answer = post(plain, path, {"inputs": x}, headers={"Accept": "text/html"})
    assert_problem(answer, 406, "not_acceptable")


def test_an_empty_batch_gives_an_empty_response(plain):
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    got = decoded(post(plain, path, {"inputs": np.empty((0, 64), np.float32)}))["outputs"]
    assert got.shape == (0, 128)


@pytest.mark.parametrize(
    "path", [f"/v1/sets/plain/adapters/{Q_PROJ}/apply", "/v1/sets/plain/apply", "/v1/apply"]
)
def test_a_body_of_the_other_form_is_named(plain, path):
    swapped = plain.post(path, content=b'{"inputs": [[1.0]]}', headers={"Content-Type": BINARY})
    detail = assert_problem(swapped, 400, "malformed_safetensors")["detail"]
    assert "looks like JSON" in detail
    assert "send it with Content-Type: application/json" in detail
    body = safetensors.encode({"inputs": np.ones((1, 64), np.float32)})
    for headers in ({"Content-Type": "application/json"}, {}):
        swapped = plain.post(path, content=body, headers=headers)
        detail = assert_problem(swapped, 400, "malformed_json")["detail"]
        assert "looks like safetensors" in detail
        assert f"send it with Content-Type: {BINARY}" in detail


def test_errors_name_what_is_wrong(plain):
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    body = assert_problem(plain.post(path, json={"inputs": [[1.0] * 63]}), 422, "shape_mismatch")
    assert (body["got"], body["expected"]) == (63, 64)
    x = np.ones((3, 64), np.float32)
    x[1, 7] = np.nan
    body = assert_problem(post(plain, path, {"inputs": x}), 422, "non_finite_input")
    assert body["index"] == [1, 7]
    assert "inputs[1][7] is NaN" in body["detail"]
    ragged = plain.post(path, json={"inputs": [[1.0] * 64, [1.0] * 60]})
    assert assert_problem(ragged, 422, "ragged_input")["row"] == 1
    assert_problem(plain.post(f"{path}?dtype=F16", json={"inputs": []}), 422, "invalid_request")
    assert_problem(post(plain, f"{path}?dtype=I8", {"inputs": x}), 422, "invalid_request")
    wrong = plain.post(path, content=b"x", headers={"Content-Type": "text/plain"})
    assert_problem(wrong, 415, "unsupported_media_type")


def test_overflow_is_an_error_in_json_and_infinity_in_binary(client):
    client.post("/v1/sets", json={"name": "s"})
    weights = {"lora_A": [[3e38]], "lora_B": [[3e38]], "alpha": 1.0}
    client.put("/v1/sets/s/adapters/m", json=weights)
    path = "/v1/sets/s/adapters/m/apply"
    assert_problem(client.post(path, json={"inputs": [10.0]}), 422, "non_finite_output")
    got = decoded(post(client, path, {"inputs": np.array([10.0], np.float32)}))["outputs"]
    assert np.isinf(got).all()


def test_many_modules_with_their_own_inputs(plain, rng):
    inputs = {
        Q_PROJ: rng.standard_normal((3, 64)).astype(np.float32),
        DOWN: rng.standard_normal((2, 160)).astype(np.float32),
        V_PROJ: rng.standard_normal(64).astype(np.float32),
    }
    as_json = plain.post(
        "/v1/sets/plain/apply", json={"inputs": {name: x.tolist() for name, x in inputs.items()}}
    ).json()
    as_binary = decoded(post(plain, "/v1/sets/plain/apply", inputs))
    assert (as_json["set"], as_json["version"]) == ("plain", 1)
    assert as_json["outputs"].keys() == as_binary.keys() == inputs.keys()
    for name, x in inputs.items():
        alone = decoded(post(plain, f"/v1/sets/plain/adapters/{name}/apply", {"inputs": x}))
        assert np.array_equal(as_binary[name], alone["outputs"])
        assert np.array_equal(np.array(as_json["outputs"][name], np.float32), alone["outputs"])


def test_one_input_for_several_modules(plain, rng):
    x = rng.standard_normal((3, 64)).astype(np.float32)
    path = f"/v1/sets/plain/apply?module={Q_PROJ}&module={V_PROJ}"
    got = decoded(post(plain, path, {"inputs": x}))
    assert got.keys() == {Q_PROJ, V_PROJ}
    for name in got:
        alone = decoded(post(plain, f"/v1/sets/plain/adapters/{name}/apply", {"inputs": x}))
        assert np.array_equal(got[name], alone["outputs"])
    assert plain.post(path, json={"inputs": x.tolist()}).json()["outputs"].keys() == got.keys()


def test_many_modules_errors(plain):
    path = "/v1/sets/plain/apply"
    one = [[1.0] * 64]
    assert_problem(plain.post(path, json={"inputs": one}), 422, "invalid_request")
    assert_problem(plain.post(path, json={"inputs": {}}), 422, "invalid_request")
    assert_problem(plain.post(path, json={"inputs": {"x": one}}), 404, "module_not_found")
    assert_problem(plain.post(path, json={"inputs": {DOWN: one}}), 422, "shape_mismatch")
    body = plain.post(f"{path}?module={Q_PROJ}", json={"inputs": {Q_PROJ: one}})
    assert_problem(body, 422, "invalid_request")


def test_an_empty_list_has_no_rows(plain):
    name = plain.get("/v1/sets/plain").json()["modules"][0]["name"]
    for path, inputs in (
        (f"/v1/sets/plain/adapters/{name}/apply", []),
        (f"/v1/sets/plain/apply?module={name}", []),
        ("/v1/sets/plain/apply", {name: []}),
    ):
        problem = assert_problem(plain.post(path, json={"inputs": inputs}), 422, "shape_mismatch")
        assert "no rows" in problem["detail"]
    for sets in ([], ["plain"]):
        answer = plain.post("/v1/apply", json={"module": name, "inputs": [], "sets": sets})
        assert "no rows" in assert_problem(answer, 422, "shape_mismatch")["detail"]


@pytest.mark.parametrize(
    "path", ["/v1/apply", "/v1/sets/plain/apply", f"/v1/sets/plain/adapters/{Q_PROJ}/apply"]
)
def test_a_field_that_the_route_does_not_read_is_refused(plain, path):
    body = {"inputs": [[0.5] * 64], "input": []}
    problem = assert_problem(plain.post(path, json=body), 422, "invalid_request")
    assert problem["got"] == ["input"]
    assert "inputs" in problem["expected"]
