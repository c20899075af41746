"""MLX adapters as peft's."""

import shutil

import numpy as np
import pytest
import reference
from conftest import DATA, read_tensors

from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.mlx import decode_mlx, is_mlx
from bonsai_lora.formats.peft import decode_adapter
from bonsai_lora.formats.peft_config import PeftConfig

Q_PROJ = "model.layers.0.self_attn.q_proj"


def mlx_config(**changes):
    return {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 10.0}, **changes}


def factors(rng, module=Q_PROJ, rank=4, d_in=6, d_out=5):
    return {
        f"{module}.lora_a": rng.standard_normal((d_in, rank)).astype(np.float32),
        f"{module}.lora_b": rng.standard_normal((rank, d_out)).astype(np.float32),
    }


def decode(config, tensors):
    raw, arrays = decode_mlx(config, tensors)
    return decode_adapter(PeftConfig(raw), arrays, "s").lora_set.registry.adapters


def test_what_is_mlx():
    assert is_mlx({"lora_parameters": {}}, [])
    assert is_mlx({}, [f"{Q_PROJ}.lora_a"])
    assert not is_mlx({"peft_type": "LORA", "lora_parameters": {}}, [])
    assert not is_mlx({"r": 8}, [f"{Q_PROJ}.lora_A.weight"])


@pytest.mark.parametrize("scale", [20.0, 0.1, 1, -3.7])
def test_the_scale_is_the_factor_whatever_the_rank(rng, scale):
    tensors = factors(rng, rank=3) | factors(rng, Q_PROJ.replace("q_", "k_"), rank=7)
    found = decode(mlx_config(lora_parameters={"rank": 3, "scale": scale}), tensors)
    assert {one.rank for one in found.values()} == {3, 7}
    for module, one in found.items():
        assert np.float32(one.scaling) == np.float32(scale)
        got = reference.delta_weight(one.a_matrix, one.b_matrix, scale)
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert np.array_equal(got, scale * (b.T.astype(np.float64) @ a.T.astype(np.float64)))


def test_dora_and_embeddings(rng):
    magnitude = np.ones(5, np.float32)
    found = decode(mlx_config(fine_tune_type="dora"), factors(rng) | {f"{Q_PROJ}.m": magnitude})
    assert found[Q_PROJ].magnitude is magnitude
    embedding = factors(rng, "model.embed_tokens", d_in=9)
    one = decode(mlx_config(), embedding)["model.embed_tokens"]
    assert (one.layer, one.d_in, one.d_out) == ("embedding", 9, 5)
    with pytest.raises(UnsupportedAdapterError, match="per token"):
        decode(mlx_config(), embedding | {"model.embed_tokens.m": np.ones(9, np.float32)})


def test_experts_of_mixtral_have_the_names_of_its_class(rng):
    tensors = {}
    for layer in ("gate_proj", "up_proj", "down_proj"):
        module = f"model.layers.1.block_sparse_moe.switch_mlp.{layer}"
        tensors[f"{module}.lora_a"] = rng.standard_normal((2, 3, 6)).astype(np.float32)
        tensors[f"{module}.lora_b"] = rng.standard_normal((2, 5, 3)).astype(np.float32)
    found = decode(mlx_config(), tensors)
    for mlx, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        for expert in range(2):
            one = found[f"model.layers.1.block_sparse_moe.experts.{expert}.{theirs}"]
            module = f"model.layers.1.block_sparse_moe.switch_mlp.{mlx}"
            assert np.array_equal(one.a_matrix, tensors[f"{module}.lora_a"][expert])
            assert np.array_equal(one.b_matrix, tensors[f"{module}.lora_b"][expert])


@pytest.mark.parametrize("flat", [False, True])
def test_fused_experts_become_one_adapter_each(rng, flat):
    module = "model.layers.0.mlp.switch_mlp.up_proj"
    lora_a = rng.standard_normal((3, 2, 6)).astype(np.float32)
    lora_b = rng.standard_normal((3, 5, 2)).astype(np.float32)
    stored = lora_a.reshape(6, 6) if flat else lora_a
    found = decode(mlx_config(), {f"{module}.lora_a": stored, f"{module}.lora_b": lora_b})
    assert list(found) == [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(3)]
    for expert, one in enumerate(found.values()):
        assert np.array_equal(one.a_matrix, lora_a[expert])
        assert np.array_equal(one.b_matrix, lora_b[expert])
    with pytest.raises(UnsupportedAdapterError, match="fused experts"):
        decode(mlx_config(), {"x.lora_a": lora_a, "x.lora_b": lora_b})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"fine_tune_type": "full"}, UnsupportedAdapterError, "expected lora or dora"),
        ({"lora_parameters": {"rank": 8}}, InvalidAdapterError, "lora_parameters.scale"),
        ({"lora_parameters": None}, InvalidAdapterError, "lora_parameters.scale"),
        ({"lora_parameters": {"scale": "20"}}, InvalidAdapterError, "finite number"),
        ({"lora_parameters": {"scale": True}}, InvalidAdapterError, "finite number"),
        ({"lora_parameters": {"alpha": 16, "scale": 1}}, UnsupportedAdapterError, "alpha"),
    ],
)
def test_configurations_that_leave_the_size_open(rng, changes, error, says):
    with pytest.raises(error, match=says):
        decode(mlx_config(**changes), factors(rng))


def test_wrong_tensors(rng):
    good = factors(rng)
    first, second = good
    for tensors in (
        {first: good[first]},
        {},
        {first: good[first], second: good[second][0]},
        {first: good[first][:, :3], second: good[second]},
        {first: good[first][:0], second: good[second]},
        {**good, "model.layers.0.mlp.switch_mlp.up_proj.lora_a": np.ones((3, 2), np.float32),
         "model.layers.0.mlp.switch_mlp.up_proj.lora_b": np.ones((2, 5, 2), np.float32)},
    ):  # fmt: skip
        with pytest.raises(InvalidAdapterError):
            decode(mlx_config(), tensors)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_as_mlx_fuses(based, tmp_path, kind):
    """What mlx_lm saved, uploaded and merged, is what its own layers fuse to."""
    folder = DATA / "mlx" / kind
    base = tmp_path / "bases" / "tiny"
    base.mkdir()
    shutil.copy(folder / "base.safetensors", base / "model.safetensors")
    files = {
        "adapter_config.json": (folder / "adapter_config.json").read_bytes(),
        "adapters.safetensors": (folder / "adapters.safetensors").read_bytes(),
    }
    report = based.put("/v1/sets/s", files=files)
    assert report.status_code == 201, report.text
    assert report.json()["warnings"] == []
    content = based.get("/v1/bases/tiny/merged/s/model.safetensors").content
    got, _ = safetensors.decode(content)
    fused = read_tensors(folder / "fused.safetensors")
    assert got.keys() == fused.keys()
    for name, expected in fused.items():
        assert reference.relative_error(got[name], expected.astype(np.float64)) < 2e-6, name
