"""What storing in few bits leaves of a delta: against closed forms, and exactly for small bases."""

import math

import ml_dtypes
import numpy as np
import pytest
from conftest import TINY, assert_problem, read_tensors, upload

from bonsai_lora.service import survival
from bonsai_lora.service.survival import Survival, survive


def normal(rng, scale, shape=(64, 4096)):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def on_grid(weights, dtype):
    return weights.astype(dtype).astype(np.float32)


def closed_form(weights, sigma, mantissa_bits, least_step):
    """Unchanged share and gain for D ~ N(0, sigma^2) and W on a grid: each entry's step decides."""
    _, exponents = np.frexp(np.abs(weights[weights != 0]).astype(np.float64))
    steps = np.maximum(2.0 ** (exponents - 1 - mantissa_bits), least_step)
    same = gain = 0.0
    values, counts = np.unique(steps, return_counts=True)
    for step, count in zip(values, counts, strict=True):
        z = step / sigma
        same += count * math.erf(z / 2 / math.sqrt(2))
        edges = (np.arange(math.ceil(8 / z) + 2) + 0.5) * z
        gain += count * 2 * z * np.sum(np.exp(-(edges**2) / 2)) / math.sqrt(2 * math.pi)
    return same / counts.sum(), gain / counts.sum()


@pytest.mark.parametrize("sigma", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 7), ("F16", 10)])
def test_rounding_to_sixteen_bits(rng, dtype, bits, sigma):
    grid = ml_dtypes.bfloat16 if dtype == "BF16" else np.float16
    weights = on_grid(normal(rng, 0.03), grid)
    found = survive(weights, normal(rng, sigma), dtype)
    unchanged, gain = closed_form(weights, sigma, bits, ml_dtypes.finfo(grid).smallest_subnormal)
    assert found.unchanged == pytest.approx(unchanged, abs=0.015)
    assert found.gain == pytest.approx(gain, abs=0.015)


@pytest.mark.parametrize(("ratio", "gain"), [(0.01, 1 / 128), (0.2, 0.009), (1.0, 0.57)])
def test_one_bit_keeps_a_direction_of_128(rng, ratio, gain):
    weights = np.where(rng.random((64, 4096)) < 0.5, -0.03125, 0.03125).astype(np.float32)
    found = survive(weights, normal(rng, 0.03125 * ratio), "Q1_0")
    assert found.gain == pytest.approx(gain, abs=0.1 * gain + 0.001)
    if ratio < 0.1:
        assert found.relative_error == pytest.approx(1, abs=0.02)


def test_q8_0_is_noise_of_its_step(rng):
    """Both rounding errors count: u^2 / 6 for the step u, if u is small beside the delta."""
    weights = normal(rng, 0.03)
    delta = normal(rng, 1e-3)
    steps = np.abs(weights.reshape(-1, 32)).max(axis=1) / 127
    found = survive(weights, delta, "Q8_0")
    assert found.gain == pytest.approx(1, abs=0.01)
    assert found.relative_error == pytest.approx(math.sqrt(np.mean(steps**2) / 6) / 1e-3, rel=0.03)


def test_a_delta_of_zero_survives():
    zeros = np.zeros((2, 128), np.float32)
    found = survive(zeros, zeros, "BF16")
    assert (found.unchanged, found.gain, found.relative_error) == (1.0, 1.0, 0.0)
    assert (Survival().unchanged, Survival().gain) == (1.0, 1.0)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "Q8_0"])
def test_small_bases_are_computed_exactly(based, dtype):
    upload(based, "plain", TINY / "plain")
    found = based.get(f"/v1/bases/tiny-qwen3/survival/plain?dtype={dtype}").json()
    base = {}
    for path in (TINY / "base").glob("*.safetensors"):
        base |= read_tensors(path)
    tensors = read_tensors(TINY / "plain" / "adapter_model.safetensors")
    assert (found["dtype"], found["skipped"], len(found["modules"])) == (dtype, [], 14)
    whole = Survival()
    for module in found["modules"]:
        key = f"base_model.model.{module['name'].removesuffix('.weight')}.lora_"
        delta = 2 * tensors[f"{key}B.weight"].astype(np.float32) @ tensors[f"{key}A.weight"]
        one = survive(base[module["name"]].astype(np.float32), delta.astype(np.float32), dtype)
        whole += one
        assert module["unchanged"] == pytest.approx(one.unchanged, abs=1e-3)
        assert module["gain"] == pytest.approx(one.gain, rel=1e-3)
        assert module["relative_error"] == pytest.approx(one.relative_error, rel=1e-3, abs=1e-5)
    assert found["gain"] == pytest.approx(whole.gain, rel=1e-3)


def test_large_tensors_are_sampled(based, monkeypatch):
    upload(based, "plain", TINY / "plain")
    exact = based.get("/v1/bases/tiny-qwen3/survival/plain").json()
    monkeypatch.setattr(survival, "SAMPLE_VALUES", 1 << 10)
    sampled = based.get("/v1/bases/tiny-qwen3/survival/plain").json()
    assert sampled != exact
    assert sampled["gain"] == pytest.approx(exact["gain"], abs=0.05)
    assert sampled["relative_error"] == pytest.approx(exact["relative_error"], rel=0.2)


def test_a_scale_makes_the_delta_smaller(based):
    upload(based, "plain", TINY / "plain")
    gains = [
        based.get(f"/v1/bases/tiny-qwen3/survival/plain?scale={scale}").json()["gain"]
        for scale in (1, 1e-5)
    ]
    assert gains[1] < 0.5 < gains[0]


def test_refusals(based):
    upload(based, "plain", TINY / "plain")
    path = "/v1/bases/tiny-qwen3/survival"
    assert_problem(based.get("/v1/bases/other/survival/plain"), 404, "base_not_found")
    assert_problem(based.get(f"{path}/absent"), 404, "set_not_found")
    assert_problem(based.get(f"{path}/plain?dtype=Q4_K"), 422, "invalid_request")
    some = based.get(f"{path}/plain?dtype=Q1_0").json()  # most rows have 64 values
    assert len(some["modules"]) == 2
    assert len(some["skipped"]) == 12
    upload(based, "dora", TINY / "dora")
    assert_problem(based.get(f"{path}/dora"), 422, "invalid_request")
