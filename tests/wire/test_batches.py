"""What a body says arrives, in whichever form it is sent; what it gets wrong is named."""

import json

import numpy as np
import pytest

from bonsai_lora.core.cast import count_rows
from bonsai_lora.errors import (
    InvalidRequestError,
    MalformedBodyError,
    MalformedJsonError,
    NonFiniteInputError,
    NonFiniteOutputError,
    RaggedInputError,
)
from bonsai_lora.formats import safetensors
from bonsai_lora.wire import oip
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.oip_tensors import decode_strings
from bonsai_lora.wire.tensors import decode_many, decode_one

X = np.array([[1.0, -2.5], [0.5, 4.0]], np.float32)
WX = np.array([[3.0], [-1.0]], np.float32)
EXPERTS = np.array([4, 0])
STACK = ["plain", {"set": "other", "weight": -0.5}]


def as_json(tensors):
    body = {"inputs": {}, "sets": STACK, "experts": EXPERTS.tolist()}
    for name, array in tensors.items():
        module, _, last = name.rpartition(".")
        if name in ("inputs", "base_outputs"):
            body[name] = array.tolist()
        elif last == "base_outputs":
            body.setdefault(last, {})[module] = array.tolist()
        else:
            body["inputs"][name] = array.tolist()
    return json.dumps(body).encode()


def as_binary(tensors):
    return safetensors.encode(tensors | {"experts": EXPERTS}, {"sets": json.dumps(STACK)})


FORMS = pytest.mark.parametrize(
    ("form", "encode"), [(Form.JSON, as_json), (Form.BINARY, as_binary)], ids=["JSON", "binary"]
)


def assert_batches(batches, inputs, base_outputs):
    for got, expected in ((batches.inputs, inputs), (batches.base_outputs, base_outputs)):
        assert got.keys() == expected.keys()
        assert all(np.array_equal(got[name], expected[name]) for name in expected)
        assert all(one.dtype == np.float32 for one in got.values())
    assert batches.stack == (("plain", 1.0), ("other", -0.5))
    assert batches.experts.tolist() == EXPERTS.tolist()


@FORMS
def test_one_batch_for_the_module_of_the_path(form, encode):
    body = encode({"inputs": X, "base_outputs": WX})
    assert_batches(decode_one(form, body, 10_000, "q"), {"q": X}, {"q": WX})


@FORMS
def test_one_batch_for_several_modules(form, encode):
    batches = decode_many(form, encode({"inputs": X}), 10_000, ["q", "k"])
    assert_batches(batches, {"q": X, "k": X}, {})


@FORMS
def test_a_batch_for_each_module(form, encode):
    body = encode({"a.q": X, "k": X[0], "a.q.base_outputs": WX})
    batches = decode_many(form, body, 10_000, [])
    assert_batches(batches, {"a.q": X, "k": X[0]}, {"a.q": WX})
    assert count_rows(batches.inputs["k"]) == 1


@pytest.mark.parametrize(
    ("inputs", "error", "row"),
    [
        ([[1, 2], [3]], RaggedInputError, 1),
        ([[1, 2], [3, 4], 5], InvalidRequestError, 2),
    ],
)
def test_the_row_that_does_not_fit_is_named(inputs, error, row):
    with pytest.raises(error) as caught:
        decode_one(Form.JSON, json.dumps({"inputs": inputs}).encode(), 100, "q")
    assert caught.value.values.items() >= {"field": "inputs", "row": row}.items()


@pytest.mark.parametrize("inputs", [[10**400], [1.5, 10**400], [[1, 2.5], [-(10**400), 3]]])
def test_integers_beyond_any_float_are_infinite(inputs):
    with pytest.raises(NonFiniteInputError):
        decode_one(Form.JSON, json.dumps({"inputs": inputs}).encode(), 100, "q")


@pytest.mark.parametrize("experts", [[0, 1.0], [True], "01", {"0": 1}])
def test_numbers_of_experts_are_integers(experts):
    body = json.dumps({"inputs": [[1], [2]], "experts": experts}).encode()
    with pytest.raises(InvalidRequestError) as caught:
        decode_one(Form.JSON, body, 100, "q")
    assert caught.value.values == {"field": "experts"}


@FORMS
def test_a_stack_that_names_a_set_twice_is_named(form, encode, monkeypatch):
    monkeypatch.setitem(globals(), "STACK", ["plain", "plain"])
    with pytest.raises(InvalidRequestError) as caught:
        decode_one(form, encode({"inputs": X}), 10_000, "q")
    assert caught.value.values == {"field": "sets"}


def test_safetensors_sent_as_json_are_recognized():
    for body, is_recognized in ((as_binary({"inputs": X}), True), (b"inputs={}", False)):
        with pytest.raises(MalformedJsonError) as caught:
            decode_one(Form.JSON, body, 10_000, "q")
        assert ("looks like safetensors" in caught.value.detail) == is_recognized


def infer_request(*shape, parameters=None):
    one = {"name": "x", "datatype": "FP32", "shape": shape, "data": []}
    if parameters:
        one = {**one, "parameters": parameters}
        del one["data"]
    return memoryview(json.dumps({"inputs": [one]}).encode())


def test_dimensions_of_an_inference_are_below_2_to_the_48():
    assert oip.decode_request(infer_request(2**48 - 1, 0), None).inputs["x"].shape == (2**48 - 1, 0)
    for wrong in (2**48, -1):
        with pytest.raises(InvalidRequestError) as caught:
            oip.decode_request(infer_request(wrong, 0), None)
        assert caught.value.values == {"field": "x"}


@pytest.mark.parametrize("name", ["shared_memory_offset", "shared_memory_byte_size"])
@pytest.mark.parametrize("wrong", [-1, 2**63, 1.0, True, "8"])
def test_a_place_in_shared_memory_is_two_sizes(name, wrong):
    place = {"shared_memory_region": "r", "shared_memory_offset": 0, "shared_memory_byte_size": 8}
    right = oip.decode_request(infer_request(2, parameters=place), None)
    assert right.inputs["x"].content == oip.Placement("r", 0, 8)
    with pytest.raises(InvalidRequestError, match=f"'{name}' of 'x'"):
        oip.decode_request(infer_request(2, parameters=place | {name: wrong}), None)


def test_an_output_that_json_cannot_carry_is_named():
    outputs = [
        (oip.InferOutput("fine"), np.ones((1, 2), np.float32)),
        (oip.InferOutput("binary", is_binary=True), np.full((1, 2), np.inf, np.float32)),
    ]
    oip.encode_response("m", "1", "", outputs)
    with pytest.raises(NonFiniteOutputError) as caught:
        oip.encode_response("m", "1", "", [(oip.InferOutput("y"), outputs[1][1])])
    assert caught.value.values == {"field": "y"}


def test_the_input_whose_strings_are_not_utf_8_is_named():
    tensor = oip.InferInput("x", "BYTES", (1,), memoryview(b"\x01\0\0\0\xff"))
    with pytest.raises(MalformedBodyError) as caught:
        decode_strings(tensor, tensor.content)
    assert caught.value.values == {"field": "x"}
