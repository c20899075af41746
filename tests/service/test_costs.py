"""What an apply is estimated to cost, which decides where it runs."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from buckets import create

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.service.apply import cost_of, cost_of_body
from bonsai_lora.service.compare import Comparison
from bonsai_lora.service.infer import MODULE_NANOSECONDS, cost_of_inference
from bonsai_lora.service.jobs import LONG_NANOSECONDS
from bonsai_lora.service.models import MIXED, Model, load
from bonsai_lora.service.spectrum import Spectra
from bonsai_lora.storage.store import SetStore
from bonsai_lora.wire.media import Form
from bonsai_lora.wire.oip import InferInput, InferOutput, InferRequest, Placement

SMALL = {"rows": 2, "d_in": 64, "d_out": 32, "rank": 4}


def cost(request=Form.BINARY, response=Form.BINARY, **sizes):
    sizes = SMALL | sizes
    adapter = LoraAdapter.new(sizes["d_in"], sizes["d_out"], LoraConfig(rank=sizes["rank"]))
    adapter.make_ready()
    return cost_of(adapter, sizes["rows"], request, response)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("request_form", "response_form"), [*product([Form.JSON, Form.BINARY], repeat=2)]
)
def test_more_of_anything_costs_more(name, request_form, response_form):
    costs = [cost(request_form, response_form, **{name: SMALL[name] * n}) for n in (1, 2, 4, 8)]
    assert 0 < costs[0] < costs[1] < costs[2] < costs[3] < math.inf


@pytest.mark.parametrize("width", ["d_in", "d_out"])
def test_what_does_not_fill_a_vector_costs_more(width):
    """Of a width of 16 n + k, the last k values are computed one by one."""
    costs = [cost(**{width: 1024 + more}) for more in range(17)]
    assert costs[:16] == sorted(costs[:16])
    assert costs[0] < costs[16] < costs[15]


def test_json_costs_more_for_each_number_read_and_written():
    binary = cost()
    assert cost(Form.JSON) - binary > 5 * SMALL["rows"] * SMALL["d_in"]
    assert cost(response=Form.JSON) - binary > 5 * SMALL["rows"] * SMALL["d_out"]


def test_what_has_to_read_a_file_first_is_never_short():
    adapter = LoraAdapter.new(64, 32, LoraConfig(rank=4))
    assert cost_of(adapter, 1, Form.BINARY, Form.BINARY) == math.inf
    dora = replace(adapter, magnitude=np.ones(32, np.float32))
    dora.make_ready()
    assert cost_of(dora, 1, Form.BINARY, Form.BINARY) == math.inf


def test_the_length_of_a_body_tells_its_rows():
    adapter = LoraAdapter.new(64, 32, LoraConfig(rank=4))
    adapter.make_ready()
    rows = cost_of(adapter, 3, Form.BINARY, Form.JSON)
    assert cost_of_body(adapter, 3 * 64 * 4, Form.BINARY, Form.JSON) == pytest.approx(rows)
    json_rows = cost_of(adapter, 3, Form.JSON, Form.JSON)
    # A number and its comma are about ten characters.
    assert cost_of_body(adapter, 3 * 64 * 10, Form.JSON, Form.JSON) == pytest.approx(json_rows)
    one = cost_of(adapter, 1, Form.BINARY, Form.JSON)
    assert cost_of_body(adapter, 1, Form.BINARY, Form.JSON) == pytest.approx(one)


@pytest.fixture
def model(tmp_path):
    """A model of one module, whose file is read."""
    store = SetStore(tmp_path)
    create(store, "s")
    load(store.read("s"))
    return Model("s", store.read("s"))


FLOATS = np.zeros((3, 8), np.float32)
REGION = Placement("region", 0, 96)


@pytest.mark.parametrize(
    ("content", "outputs", "is_binary", "forms"),
    [
        (memoryview(FLOATS), None, True, (Form.BINARY, Form.BINARY)),
        (memoryview(FLOATS), None, False, (Form.BINARY, Form.JSON)),
        (FLOATS.tolist(), None, True, (Form.JSON, Form.BINARY)),
        (FLOATS, None, False, (Form.JSON, Form.JSON)),  # parsed ahead of the rest
        (96, [InferOutput("q_proj")], True, (Form.BINARY, Form.JSON)),
        (96, [InferOutput("q_proj", is_binary=True)], False, (Form.BINARY, Form.BINARY)),
        (REGION, [InferOutput("q_proj", placed=REGION)], False, (Form.BINARY, Form.BINARY)),
    ],
)
@pytest.mark.parametrize("source", ["q_proj", "x"])
def test_an_inference_costs_what_its_applies_do(model, source, content, outputs, is_binary, forms):
    tensor = InferInput(source, "FP32", (3, 8), content)
    request = InferRequest("", {source: tensor}, outputs, is_binary)
    if source == "x" and outputs is None:  # it is for all modules that it fits
        assert cost_of_inference(model, request) == math.inf
        return
    apply = cost_of(model.adapters["q_proj"], 3, *forms)
    assert cost_of_inference(model, request) == MODULE_NANOSECONDS + apply
    twice = replace(request, outputs=[InferOutput("q_proj", is_binary)] * 2)
    assert cost_of_inference(model, twice) > cost_of_inference(model, request)


def test_an_inference_of_no_set_or_module_has_no_estimate(model):
    request = InferRequest("", {"x": InferInput("x", "FP32", (3, 8), 96)}, [InferOutput("other")])
    assert cost_of_inference(Model(MIXED, None), request) == math.inf
    assert cost_of_inference(model, request) == 0, "it is refused at once"


def test_two_sets_are_compared_at_once_and_many_are_not():
    one = LoraAdapter.new(4096, 4096, LoraConfig(rank=64))
    costs = [Comparison(["s"] * n, {"m": [one] * n}).nanoseconds() for n in (2, 64)]
    assert costs[0] < LONG_NANOSECONDS / 10
    assert costs[1] > LONG_NANOSECONDS


def test_spectra_cost_the_square_of_the_rank():
    low, high = (LoraAdapter.new(4096, 4096, LoraConfig(rank=rank)) for rank in (8, 256))
    cost = Spectra({"m": low}).nanoseconds()
    assert Spectra({"m": low, "n": low}).nanoseconds() == 2 * cost
    assert Spectra({"m": high}).nanoseconds() == 32**2 * cost
    assert Spectra({"m": low, "n": high}).work_bytes() == 16 * 256 * 8192
    assert Spectra({}).work_bytes() == 0
