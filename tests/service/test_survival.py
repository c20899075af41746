"""What storing in few bits leaves of a delta: against closed forms, and exactly for small bases."""

import json
import math
import threading
from pathlib import Path

import gguf_models
import ml_dtypes
import numpy as np
import pytest
from conftest import (
    TINY,
    assert_problem,
    gain_of,
    peft_config,
    peft_tensors,
    read_tensors,
    upload,
    upload_parts,
)

from bonsai_lora.checkpoints import exponents
from bonsai_lora.core import rounding
from bonsai_lora.formats import safetensors
from bonsai_lora.service import gain, survival
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


@pytest.mark.parametrize(("ratio", "expected"), [(0.01, 1 / 128), (0.2, 0.009), (1.0, 0.57)])
def test_one_bit_keeps_a_direction_of_128(rng, ratio, expected):
    weights = np.where(rng.random((64, 4096)) < 0.5, -0.03125, 0.03125).astype(np.float32)
    found = survive(weights, normal(rng, 0.03125 * ratio), "Q1_0")
    assert found.gain == pytest.approx(expected, abs=0.1 * expected + 0.001)
    if ratio < 0.1:
        assert found.relative_error == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", ["Q2_0", "TQ2_0"])
def test_ternary_storage_is_worse_than_no_delta(rng, dtype):
    """The scale is the largest entry, which grows by the largest delta of a group."""
    codes = rng.integers(-1, 2, (64, 4096))
    found = survive((codes * 0.03125).astype(np.float32), normal(rng, 0.03125 * 0.03), dtype)
    assert found.gain < 0.03
    assert found.relative_error > 1.5


@pytest.mark.parametrize("dtype", ["Q1_0", "Q2_0", "TQ1_0", "TQ2_0"])
def test_few_bits_read_back_as_the_files_of_other_programs_do(rng, dtype):
    """Quantized and read by the codecs of GGUF files; weights of the type itself stay as they are."""
    width, stored = survival.STORED[dtype]
    values = normal(rng, 0.03, (32, 512))
    got = stored(values)
    groups, found = values.reshape(-1, width), got.reshape(-1, width)
    scale = (
        (np.abs(groups).mean(axis=1) if dtype == "Q1_0" else np.abs(groups).max(axis=1))
        .astype(np.float16)
        .astype(np.float32)[:, None]
    )
    codes = np.sign(groups) if dtype == "Q1_0" else np.rint(groups / np.abs(groups).max(1)[:, None])
    np.testing.assert_allclose(found, codes * scale, rtol=1e-3, atol=1e-9)
    np.testing.assert_array_equal(stored(got), got)


def test_q8_0_is_noise_of_its_step(rng):
    """Both rounding errors count: u^2 / 6 for the step u, if u is small beside the delta."""
    weights = normal(rng, 0.03)
    delta = normal(rng, 1e-3)
    steps = np.abs(weights.reshape(-1, 32)).max(axis=1) / 127
    found = survive(weights, delta, "Q8_0")
    assert found.gain == pytest.approx(1, abs=0.01)
    assert found.relative_error == pytest.approx(math.sqrt(np.mean(steps**2) / 6) / 1e-3, rel=0.03)


@pytest.mark.parametrize("dtype", survival.STORED)
def test_a_delta_of_zero_survives(dtype):
    zeros = np.zeros((2, 256), np.float32)
    found = survive(zeros, zeros, dtype)
    assert (found.unchanged, found.gain, found.relative_error) == (1.0, 1.0, 0.0)


def test_without_entries_nothing_is_lost():
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


@pytest.mark.parametrize("shape", [(0, 6), (5, 0)])
def test_of_an_empty_matrix_nothing_is_lost(based, tmp_path, rng, shape):
    name = "model.layers.0.self_attn.q_proj"
    base = tmp_path / "bases" / "empty"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen3"}')
    empty = {f"{name}.weight": np.zeros(shape, np.float32)}
    (base / "model.safetensors").write_bytes(safetensors.encode(empty))
    based.post("/v1/sets", json={"name": "s", "config": {"rank": 2}})
    body = {"d_out": shape[0], "d_in": shape[1]}
    assert based.put(f"/v1/sets/s/adapters/{name}", json=body).status_code == 201
    answer = based.get("/v1/bases/empty/survival/s?dtype=BF16")
    assert answer.status_code == 200, answer.text
    (module,) = answer.json()["modules"]
    assert (module["unchanged"], module["gain"], module["relative_error"]) == (1, 1, 0)


def test_the_exact_figures_are_a_job(based, monkeypatch):
    upload(based, "plain", TINY / "plain")
    path = "/v1/bases/tiny-qwen3/survival/plain?dtype=BF16&scale=0.5"
    small = based.get(path).json()  # all rows of small tensors
    assert small.pop("exact") is False
    monkeypatch.setattr(survival, "_BLOCK_VALUES", 1000)
    started = based.post(path)
    assert started.status_code == 202
    job = started.json()
    while job["state"] in ("queued", "running"):
        job = based.get(started.headers["location"]).json()
    assert (job["state"], job["result"].pop("exact")) == ("done", True)
    assert job["result"]["skipped"] == small["skipped"] == []
    for exact, sampled in zip(
        [job["result"], *job["result"]["modules"]], [small, *small["modules"]], strict=True
    ):
        assert exact["unchanged"] == sampled["unchanged"]
        assert exact["gain"] == pytest.approx(sampled["gain"], rel=1e-5)
    assert_problem(based.post("/v1/bases/absent/survival/plain"), 404, "base_not_found")


@pytest.mark.parametrize(
    ("z", "expected"), [(0.5, 1), (1, 1), (2, 0.9856), (3, 0.7772), (4, 0.4319), (6, 0.0532)]
)
def test_the_gain_of_rounding(z, expected):
    assert rounding.gain(z) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sigma", [1e-5, 3e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_closed_form_is_what_storing_finds(rng, dtype, sigma):
    grid = ml_dtypes.bfloat16 if dtype == "BF16" else np.float16
    weights = on_grid(normal(rng, 0.03), grid)
    delta = normal(rng, sigma)
    delta[:32] *= 3
    _, exponents = np.frexp(weights[weights != 0])
    counts = dict(zip(*np.unique(exponents - 1, return_counts=True), strict=True))
    squares = np.square(delta, dtype=np.float64).sum(axis=1)
    described = rounding.Weights(counts, {})
    kept = rounding.kept_squares(squares, delta.shape[1], described, dtype)
    assert kept / squares.sum() == pytest.approx(survive(weights, delta, dtype).gain, abs=0.01)


def test_downloads_of_a_gguf_base_say_it_for_their_own_type(based, tmp_path, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    (tmp_path / "bases" / "bonsai.gguf").write_bytes(raw)
    tensors = peft_tensors(rng, d_in=256, d_out=256)
    tensors = {name: one * np.float32(0.003) for name, one in tensors.items()}
    assert upload_parts(based, "s", peft_config(), tensors).status_code == 201
    path = "/v1/bases/bonsai/merged/s"
    for file, dtype in (("bonsai.gguf", "F16"), ("model.safetensors", "BF16")):
        exact = based.get(f"/v1/bases/bonsai/survival/s?dtype={dtype}").json()["gain"]
        assert gain_of(based, f"{path}/{file}") == pytest.approx(exact, abs=0.15)
    assert gain_of(based, f"{path}/bonsai.gguf?dtype=F32") > 0.999
    head = based.head(f"{path}/bonsai.gguf?dtype=Q8_0")
    assert head.status_code == 200
    assert "bonsai-delta-gain" not in head.headers


def test_merged_downloads_say_what_is_left_once_it_is_known(based, settings, monkeypatch):
    upload(based, "plain", TINY / "plain")
    path = "/v1/bases/tiny-qwen3/merged/plain/model-00001-of-00003.safetensors"
    hub = "/tiny-qwen3/plain/resolve/main/model-00001-of-00003.safetensors"

    got = gain_of(based, path)
    exact = based.get("/v1/bases/tiny-qwen3/survival/plain").json()["gain"]
    assert got == pytest.approx(exact, abs=0.02)
    assert gain_of(based, hub) == got
    assert based.get(path).headers["bonsai-delta-gain"] == f"{got:.4f}"
    logged = []
    monkeypatch.setattr(gain._log, "warning", lambda text, *values: logged.append(text % values))
    little = gain_of(based, f"{path}?scale=0.00001")
    assert little < 0.5
    (text,) = logged
    assert text.startswith(f"merging 'plain' into base 'tiny-qwen3' keeps {100 * little:.0f} %")
    (file,) = (Path(settings.store) / "exponents").iterdir()
    assert len(json.loads(file.read_bytes())) == 16  # every matrix
    plain = based.get("/bases/tiny-qwen3/resolve/main/model-00001-of-00003.safetensors")
    assert "bonsai-delta-gain" not in plain.headers


def test_what_is_left_of_several_models_is_computed_one_after_the_other(based, monkeypatch):
    upload(based, "plain", TINY / "plain")
    path = "/v1/bases/tiny-qwen3/merged/plain/model-00001-of-00003.safetensors"
    begun, computed = threading.Event(), gain.gain_of

    def slow(*model):
        assert begun.wait(10)
        return computed(*model)

    monkeypatch.setattr(gain, "gain_of", slow)
    scales = ("1", "0.5", "0.25")
    for scale in scales:
        assert "bonsai-delta-gain" not in based.head(f"{path}?scale={scale}").headers
    begun.set()
    found = [gain_of(based, f"{path}?scale={scale}") for scale in scales]
    assert found == sorted(found, reverse=True)


def test_every_64th_row_of_a_large_tensor_is_counted(monkeypatch, rng):
    weights = (rng.standard_normal((640, 32)) * 0.03).astype(np.float32)

    class InMemory(np.ndarray):
        def __getitem__(self, block):
            return np.asarray(self)[block]

    whole = exponents._count(weights.view(InMemory))
    assert sum(whole.exponents.values()) == weights.size
    assert whole.on_grid["F16"] < 0.01
    halves = weights.astype(np.float16).astype(np.float32).view(InMemory)
    assert exponents._count(halves).on_grid["F16"] == 1.0
    monkeypatch.setattr(exponents, "SMALL_VALUES", 1000)
    some = exponents._count(weights.view(InMemory))
    _, expected = np.unique(np.frexp(weights[::64])[1], return_counts=True)
    assert list(some.exponents.values()) == expected.tolist()


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
