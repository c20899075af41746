"""What an apply is estimated to cost, which decides where it runs."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.service.apply import cost_of, cost_of_body
from bonsai_lora.service.compare import Comparison
from bonsai_lora.service.jobs import LONG_NANOSECONDS
from bonsai_lora.service.spectrum import Spectra
from bonsai_lora.wire.media import Form

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
    one = cost_of(adapter, 1, Form.BINARY, Form.JSON)
    assert cost_of_body(adapter, 1, Form.BINARY, Form.JSON) == pytest.approx(one)


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
