"""Every call of the client against a real service."""

import io
import json
import shutil
from functools import partial

import numpy as np
import pytest
import reference
from conftest import DATA, TINY, read_tensors
from ml_dtypes import bfloat16

from bonsai_lora import Client, Layer, errors

MODULE = "model.layers.0.self_attn.q_proj"
SHAPES = {"q_proj": (4, 3), "k_proj": (4, 2)}


@pytest.fixture
def client(service):
    with Client(service) as client:
        yield client


@pytest.fixture
def weights(client, rng):
    """A and B of two modules of the sets `a` and `b`, which have scaling 2."""
    made = {}
    for name, rank in ("a", 2), ("b", 3):
        client.create_set(name, config={"rank": rank, "alpha": 2.0 * rank})
        for module, (d_in, d_out) in SHAPES.items():
            made[name, module] = (
                rng.standard_normal((rank, d_in)).astype(np.float32),
                rng.standard_normal((d_out, rank)).astype(np.float32),
            )
            client.put_weights(name, module, *made[name, module])
    return made


def close(got, a, b, x, factor=1.0):
    return reference.relative_error(got, reference.apply(a, b, 2.0 * factor, x)) < 1e-6


def test_sets_are_created_listed_shown_and_deleted(client):
    info = client.create_set("one", base_model_name="m", config={"rank": 4}, model="qwen3-0.6b")
    assert (info["version"], info["config"]["rank"], info["base_model_name"]) == (1, 4, "m")
    assert client.get_set("one") == info
    assert info["etag"]
    shape = {"hidden_size": 8, "num_heads": 2}
    mlp = {"hidden_size": 8, "intermediate_size": 16}
    made = client.create_set("two", attention=shape, mlp=mlp, num_layers=2)
    assert made["adapter_count"] == 14
    for number in range(5):
        client.create_set(f"x{number}")
    names = [one["name"] for one in client.list_sets(page_size=2)]
    assert names == ["one", "two", "x0", "x1", "x2", "x3", "x4"]
    assert [one["name"] for one in client.list_sets(base_model_name="m")] == ["one"]
    assert client.list_page(limit=1)["next_cursor"] is not None
    with pytest.raises(errors.SetExistsError):
        client.create_set("one")
    with pytest.raises(errors.PreconditionFailedError):
        client.delete_set("one", if_match='"other"')
    assert client.delete_set("one", if_match=info["etag"]) is None
    with pytest.raises(errors.SetNotFoundError, match="there is no set named 'one'"):
        client.get_set("one")


def version_calls(client, x):
    """Each call that takes the version of the set `a` that is meant."""
    w = np.zeros((3, 4), np.float32)
    return {
        "get_set": partial(client.get_set, "a"),
        "get_adapter_config": partial(client.get_adapter_config, "a"),
        "get_adapter_tensors": partial(client.get_adapter_tensors, "a"),
        "get_adapter_model": partial(client.get_adapter_model, "a"),
        "list_adapters": partial(client.list_adapters, "a"),
        "get_adapter": partial(client.get_adapter, "a", "q_proj"),
        "apply": partial(client.apply, "a", "q_proj", x),
        "apply_many": partial(client.apply_many, "a", {"q_proj": x}),
        "merge": partial(client.merge, "a", "q_proj", w),
        "merge_stream": lambda version: b"".join(
            client.merge_stream("a", "q_proj", [w.tobytes()], dtype="F32", version=version)
        ),
        "get_set_stats": partial(client.get_set_stats, "a"),
        "get_spectrum": partial(client.get_spectrum, "a"),
        "layer": lambda version: Layer(client, "a", "q_proj", version=version)(x),
    }


def test_the_version_that_is_meant_or_none(client, weights):
    x = np.ones((1, 4), np.float32)
    version = client.get_set("a")["version"]
    for name, call in version_calls(client, x).items():
        call(version=version)
        for other in (version - 1, version + 1):
            with pytest.raises(errors.VersionNotFoundError) as refused:
                call(version=other)
            assert refused.value.values["expected"] == version, name


def test_the_gguf_file_of_a_version(client, tmp_path):
    client.upload_set("plain", TINY / "plain")
    whole = client.get_adapter_gguf("plain", version=1)
    client.pull_gguf("plain", tmp_path / "a.gguf", version=1)
    assert (tmp_path / "a.gguf").read_bytes() == whole
    for call in (
        partial(client.get_adapter_gguf, "plain"),
        partial(client.pull_gguf, "plain", tmp_path / "b.gguf"),
    ):
        with pytest.raises(errors.VersionNotFoundError):
            call(version=2)
    assert not (tmp_path / "b.gguf").exists()


def test_a_model_takes_its_version_as_number_or_text(client, weights):
    version = client.get_set("a")["version"]
    x = {"q_proj": np.ones((1, 4), np.float32)}
    calls = (
        client.get_model,
        client.get_model_ready,
        client.get_model_config,
        client.get_model_statistics,
        partial(client.infer, inputs=x),
    )
    for call in calls:
        assert call("a", version=version) is not None
        assert call("a", version=str(version)) is not None
        with pytest.raises(errors.NotFoundError):
            call("a", version=version + 1)


def test_pages_are_read_as_needed(client):
    for number in range(3):
        client.create_set(f"x{number}")
    sets = client.list_sets(page_size=1)
    assert next(sets)["name"] == "x0"
    client.delete_set("x1")
    assert [one["name"] for one in sets] == ["x2"]


def test_a_peft_folder_goes_in_and_comes_out(client, tmp_path):
    folder = TINY / "plain"
    report = client.upload_set("plain", folder, if_none_match="*")
    assert (report["version"], report["adapter_count"], report["warnings"]) == (1, 14, [])
    assert report["etag"] == client.get_set("plain")["etag"]
    with pytest.raises(errors.PreconditionFailedError):
        client.upload_set("plain", str(folder), if_none_match="*")
    assert client.upload_set("plain", folder, if_match=report["etag"])["version"] == 2
    with pytest.raises(errors.InvalidRequestError, match="unknown query parameter 'if_macth'"):
        client.upload_set("plain", folder, if_macth=report["etag"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert client.get_adapter_config("plain")["r"] == config["r"]
    tensors = read_tensors(folder / "adapter_model.safetensors")
    exported = client.get_adapter_tensors("plain")
    assert exported.keys() == tensors.keys()
    for name, array in tensors.items():
        assert exported[name].dtype == array.dtype
        assert np.array_equal(exported[name], array)
    model = client.get_adapter_model("plain")
    assert client.pull("adapters/plain", tmp_path / "out")["folder"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == model
    with pytest.raises(FileNotFoundError):
        client.upload_set("x", tmp_path)


def test_a_base_model_is_named_on_upload_and_later(client):
    report = client.upload_set("named", TINY / "plain", base_model_name="mine")
    assert report["base_model_name"] == "mine"
    changed = client.change_set("named", base_model_name="other", if_match=report["etag"])
    assert (changed["base_model_name"], changed["version"]) == ("other", 2)
    with pytest.raises(errors.PreconditionFailedError):
        client.change_set("named", base_model_name="x", if_match=report["etag"])


def test_an_mlx_folder_goes_in(client, tmp_path):
    shutil.copytree(DATA / "mlx" / "lora", tmp_path / "mlx")
    assert client.upload_set("mlx", tmp_path / "mlx")["origin"] == "mlx"


@pytest.fixture
def fused(client, rng):
    """What a set `moe` says of its one module, which has three experts of rank 2."""
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 4), (5, 6)))
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "target_modules": [],
        "peft_version": "0.21.2",
    }
    path = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    report = client.upload_tensors("moe", config, tensors, expert_b_layout="grouped_by_expert")
    (info,) = report["modules"]
    assert info["experts"] == 3
    return info


def test_experts_are_chosen_row_by_row(client, fused, rng):
    module, x = fused["name"], rng.standard_normal((3, fused["d_in"])).astype(np.float32)
    together = client.apply("moe", module, x, experts=[2, 0, 1]).outputs
    for row, expert in enumerate((2, 0, 1)):
        alone = client.apply("moe", module, x[row : row + 1], experts=[expert]).outputs
        assert np.array_equal(alone[0], together[row])
    many = client.apply_many("moe", x, modules=[module], experts=[2, 0, 1]).outputs
    assert np.array_equal(many[module], together)
    mixed = client.apply_mixed(module, ["moe"] * 3, x, experts=np.array([2, 0, 1], np.uint8))
    assert np.array_equal(mixed.outputs, together)
    assert client.apply("moe", module, x[:0], experts=[]).outputs.shape == (0, fused["d_out"])
    with pytest.raises(errors.InvalidRequestError):
        client.apply("moe", module, x, experts=[2, 0, 3])
    for wrong in ([0.5, 0, 1], np.array([2**64 - 1, 0, 1], np.uint64)):
        with pytest.raises(errors.InvalidRequestError, match="expected integers"):
            client.apply("moe", module, x, experts=wrong)


def test_match_chooses_among_the_tensors_of_a_base(client):
    client.upload_set("plain", TINY / "plain")
    assert client.get_base("tiny-qwen3")["ignored_files"] == []
    files, matched = (
        {
            one["name"]: one["size_bytes"]
            for one in client.list_merged_files("tiny-qwen3", "plain", match=match)
        }
        for match in (None, "model.")
    )
    assert files == matched
    with pytest.raises(errors.BonsaiLoraError, match=r"visual\."):
        client.list_merged_files("tiny-qwen3", "plain", match="visual.")
    x = np.ones((1, 64), np.float32)
    matched = client.apply("plain", MODULE, x, match="model.").outputs
    assert np.array_equal(matched, client.apply("plain", MODULE, x).outputs)


def test_an_upload_from_files_bytes_and_arrays(client):
    folder = TINY / "plain"
    config = folder / "adapter_config.json"
    raw = (folder / "adapter_model.safetensors").read_bytes()
    client.upload_files("a", {"adapter_config": config, "adapter_model": io.BytesIO(raw)})
    client.upload_files("b", {"adapter_config": config.read_bytes(), "adapter_model": raw})
    tensors = read_tensors(folder / "adapter_model.safetensors")
    client.upload_tensors("c", json.loads(config.read_text()), tensors)
    first, *others = (client.get_adapter_tensors(name) for name in "abc")
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in first | other)


def test_adapters_are_put_shown_and_deleted(client, rng):
    client.create_set("s", config={"rank": 2, "alpha": 6.0})
    made = client.put_adapter("s", "q_proj", 4, 3)
    assert (made["d_in"], made["d_out"], made["rank"], made["scaling"]) == (4, 3, 2, 3.0)
    assert client.put_adapter("s", "k_proj", 4, 3, config={"rank": 1})["rank"] == 1
    a, b = rng.standard_normal((2, 4)), rng.standard_normal((3, 2))
    assert client.put_weights("s", "v_proj", a, b.tolist(), alpha=10)["scaling"] == 5.0
    delta = client.apply("s", "v_proj", np.eye(4)).outputs
    assert np.allclose(delta, 5 * (b @ a).T, rtol=1e-5, atol=1e-5)
    assert client.put_weights("s", "v_proj", a.astype(bfloat16), b.astype(np.float16))
    assert [one["name"] for one in client.list_adapters("s")] == ["q_proj", "k_proj", "v_proj"]
    assert client.get_adapter("s", "k_proj")["rank"] == 1
    etag = client.get_set("s")["etag"]
    for change in (
        lambda: client.put_adapter("s", "k_proj", 4, 3, if_match='"old"'),
        lambda: client.put_weights("s", "k_proj", a, b, if_match='"old"'),
        lambda: client.delete_adapter("s", "k_proj", if_match='"old"'),
    ):
        with pytest.raises(errors.PreconditionFailedError):
            change()
    assert client.get_set("s")["etag"] == etag
    client.delete_adapter("s", "k_proj", if_match=etag)
    with pytest.raises(errors.AdapterNotFoundError, match="k_proj"):
        client.get_adapter("s", "k_proj")
    with pytest.raises(errors.ShapeMismatchError, match="with the same r"):
        client.put_weights("s", "q_proj", np.ones((2, 4)), np.ones((3, 5)))


@pytest.mark.parametrize("rows", [None, 1, 5, 0])
def test_apply_one(client, weights, rng, rows):
    x = rng.standard_normal((4,) if rows is None else (rows, 4)).astype(np.float32)
    applied = client.apply("a", "q_proj", x)
    assert applied.outputs.dtype == np.float32
    assert applied.outputs.shape == (*x.shape[:-1], 3)
    assert applied.outputs.flags.writeable
    assert applied.versions == {"a": 3}
    if rows != 0:
        assert close(applied.outputs, *weights["a", "q_proj"], x)


def test_apply_with_a_stack_a_scale_and_a_dtype(client, weights, rng):
    x = rng.standard_normal((2, 4)).astype(np.float32)
    expected = sum(
        factor * reference.apply(*weights[name, "q_proj"], 2.0, x)
        for name, factor in (("a", 0.5), ("b", -2.0))
    )
    stacked = client.apply("a", "q_proj", x, sets={"a": 0.5, "b": -2.0}, scale=3)
    assert stacked.versions == {"a": 3, "b": 3}
    assert reference.relative_error(stacked.outputs, 3 * expected) < 1e-6
    for dtype, kind, tolerance in (("F16", np.float16, 1e-3), ("BF16", bfloat16, 8e-3)):
        rounded = client.apply("a", "q_proj", x, dtype=dtype).outputs
        assert rounded.dtype == kind
        full = reference.apply(*weights["a", "q_proj"], 2.0, x)
        assert np.allclose(rounded.astype(float), full, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [np.float16, bfloat16, np.float64, np.int64, np.longdouble, ">f4"])
def test_inputs_of_every_dtype(client, weights, rng, kind):
    x = (rng.standard_normal((2, 4)) * 4).astype(kind)
    outputs = client.apply("a", "q_proj", x).outputs
    assert close(outputs, *weights["a", "q_proj"], x.astype(np.float64))


def test_inputs_that_are_lists_or_not_contiguous(client, weights, rng):
    x = rng.standard_normal((4, 6)).astype(np.float32)
    assert close(client.apply("a", "q_proj", x.T).outputs, *weights["a", "q_proj"], x.T)
    listed = client.apply("a", "q_proj", x[:, 0].tolist()).outputs
    assert close(listed, *weights["a", "q_proj"], x[:, 0])


def test_apply_many(client, weights, rng):
    x = {module: rng.standard_normal((2, 4)).astype(np.float32) for module in SHAPES}
    applied = client.apply_many("a", x)
    assert applied.versions == {"a": 3}
    for module in SHAPES:
        assert close(applied.outputs[module], *weights["a", module], x[module])
    shared = client.apply_many("a", x["q_proj"], modules=list(SHAPES), scale=2, sets={"a": 3.0})
    for module in SHAPES:
        assert close(shared.outputs[module], *weights["a", module], x["q_proj"], 6)


def test_apply_mixed(client, weights, rng):
    x = rng.standard_normal((5, 4)).astype(np.float32)
    rows = ["a", None, {"a": 0.5}, {"a": 1.0, "b": -1.0}, {}]
    applied = client.apply_mixed("q_proj", rows, x, scale=2)
    assert applied.versions == {"a": 3, "b": 3}
    outputs = applied.outputs
    a, b = (weights[name, "q_proj"] for name in "ab")
    assert close(outputs[0], *a, x[0], 2)
    assert not outputs[[1, 4]].any()
    assert close(outputs[2], *a, x[2], 1)
    both = reference.apply(*a, 4.0, x[3]) - reference.apply(*b, 4.0, x[3])
    assert reference.relative_error(outputs[3], both) < 1e-6
    assert client.apply_mixed("q_proj", [], np.empty((0, 4))).outputs.shape[0] == 0


def test_a_dora_module_takes_what_the_base_gives(client):
    client.upload_set("dora", TINY / "dora")
    golden = read_tensors(TINY / "dora" / "golden.safetensors")
    x, y = golden[f"{MODULE}.x"], golden[f"{MODULE}.y"]
    plain = x @ base_weight(MODULE).astype(np.float32).T
    one = client.apply("dora", MODULE, x, base_outputs=plain).outputs
    many = client.apply_many("dora", {MODULE: x}, base_outputs={MODULE: plain}).outputs[MODULE]
    mixed = client.apply_mixed(MODULE, ["dora"] * len(x), x, base_outputs=plain).outputs
    for outputs in (one, many, mixed):
        assert np.allclose(plain + outputs, y, rtol=1e-4, atol=1e-4)
    with pytest.raises(errors.DoraNeedsBaseError):
        client.apply("dora", MODULE, x)


def base_weight(module):
    found = {}
    for path in (TINY / "base").glob("*.safetensors"):
        found |= read_tensors(path)
    return found[f"{module}.weight"]


def test_wrong_inputs(client, weights):
    with pytest.raises(errors.ShapeMismatchError) as refused:
        client.apply("a", "q_proj", np.ones((1, 5)))
    assert (refused.value.values["got"], refused.value.values["expected"]) == (5, 4)
    with pytest.raises(errors.NonFiniteInputError, match=r"inputs\[0\]\[2\] is NaN"):
        client.apply("a", "q_proj", [[0, 1, np.nan, 1]])
    with pytest.raises(errors.NonFiniteInputError, match=r"inputs\[1\] is infinite"):
        client.apply("a", "q_proj", [0, 1e300, 1, 1])
    with pytest.raises(errors.RaggedInputError, match="different lengths"):
        client.apply("a", "q_proj", [[1, 2], [1]])
    with pytest.raises(errors.InvalidRequestError, match="expected numbers"):
        client.apply("a", "q_proj", ["x"])
    with pytest.raises(errors.InvalidRequestError, match="scale"):
        client.apply("a", "q_proj", np.ones(4), scale=float("nan"))


@pytest.mark.parametrize("kind", [np.float32, np.float16, bfloat16])
def test_merge_a_matrix(client, weights, rng, kind):
    w = rng.standard_normal((3, 4)).astype(kind)
    a, b = weights["a", "q_proj"]
    merged = client.merge("a", "q_proj", w)
    assert merged.dtype == kind
    assert merged.flags.writeable
    exact = w.astype(np.float64) + 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    tolerance = {np.float32: 1e-6, np.float16: 1e-3, bfloat16: 8e-3}[kind]
    assert np.allclose(merged.astype(float), exact, rtol=tolerance, atol=tolerance)
    undone = client.merge("a", "q_proj", merged, unmerge=True)
    assert np.allclose(undone.astype(float), w.astype(float), atol=8 * tolerance)
    assert np.array_equal(client.merge("a", "q_proj", np.asfortranarray(w)), merged)


def test_merges_that_are_refused(client, weights):
    with pytest.raises(errors.ShapeMismatchError):
        client.merge("a", "q_proj", np.ones((4, 3), np.float32))
    with pytest.raises(errors.InvalidRequestError, match="float64"):
        client.merge("a", "q_proj", np.ones((3, 4)))
    with pytest.raises(errors.AdapterNotFoundError):
        client.merge("a", "x_proj", np.ones((3, 4), np.float32))


def test_statistics_and_operations(client, weights):
    stats = client.get_set_stats("a", base_param_count=1000)
    assert (stats["adapter_count"], stats["base_param_count"]) == (2, 1000)
    assert stats["efficiency_ratio"] == pytest.approx(26 / 1000)
    assert client.get_set_stats("a")["efficiency_ratio"] is None
    assert client.get_stats()["set_count"] == 2
    fits = client.estimate(d_in=4, d_out=4, rank=2, budget_bytes=200)
    assert fits == {"adapters": 3, "bytes_per_adapter": 64}
    assert client.get_health() == {"status": "alive"}
    assert client.get_readiness()["sets"] == 2
    assert "bonsai_lora" in client.get_metrics()


def test_bases_and_merged_files(client):
    client.upload_set("plain", TINY / "plain")
    (base,) = client.list_bases()["bases"]
    assert client.get_base("tiny-qwen3") == base
    with pytest.raises(errors.BaseNotFoundError):
        client.get_base("nothing")
    files = client.list_merged_files("tiny-qwen3", "plain")
    assert {one["name"] for one in files} == {path.name for path in (TINY / "base").iterdir()}
    name = "model-00001-of-00003.safetensors"
    whole = client.get_merged_file("tiny-qwen3", "plain", name)
    assert len(whole) == {one["name"]: one["size_bytes"] for one in files}[name]
    part = client.get_merged_file("tiny-qwen3", "plain", name, start=5, stop=4005)
    assert part == whole[5:4005]
    assert client.get_merged_file("tiny-qwen3", "plain", name, start=5) == whole[5:]
    blocks = client.stream_merged_file("tiny-qwen3", "plain", name, start=7)
    assert b"".join(blocks) == whole[7:]
    original = (TINY / "base" / name).read_bytes()
    again = {"scale": 0.5, "sets": {"plain-too": -0.5}}
    client.upload_set("plain-too", TINY / "plain")
    assert client.get_merged_file("tiny-qwen3", "plain", name, **again) == original != whole
    assert client.list_merged_files("tiny-qwen3", "plain", **again) != files
    with pytest.raises(errors.FileNotInModelError):
        client.get_merged_file("tiny-qwen3", "plain", "nothing.bin")
    with pytest.raises(errors.RangeNotSatisfiableError):
        client.get_merged_file("tiny-qwen3", "plain", name, start=len(whole))
    with pytest.raises(ValueError, match="no bytes from 5 to 5"):
        client.get_merged_file("tiny-qwen3", "plain", name, start=5, stop=5)


def test_the_open_inference_protocol(client, weights, rng):
    x = rng.standard_normal((2, 4)).astype(np.float32)
    inferred = client.infer("a", {"x": x}, request_id="7")
    assert (inferred.model_name, inferred.model_version, inferred.id) == ("a", "3", "7")
    assert inferred.outputs.keys() == set(SHAPES)
    for module in SHAPES:
        assert close(inferred.outputs[module], *weights["a", module], x)
    one = client.infer("a", {"x": x.astype(bfloat16)}, outputs=["k_proj"], version="3", scale=2)
    assert one.outputs.keys() == {"k_proj"}
    rounded = x.astype(bfloat16).astype(np.float64)
    assert close(one.outputs["k_proj"], *weights["a", "k_proj"], rounded, 2)
    mixed = client.infer("mixed", {"q_proj": x}, sets=["b", None]).outputs["q_proj"]
    assert close(mixed[0], *weights["b", "q_proj"], x[0])
    assert not mixed[1].any()
    stacked = client.infer("mixed", {"q_proj": x}, sets=[{"b": 0.5}, "a"]).outputs["q_proj"]
    assert close(stacked[0], *weights["b", "q_proj"], x[0], 0.5)
    with pytest.raises(errors.NotFoundError, match="unknown model: 'nobody'"):
        client.infer("nobody", {"x": x})
    with pytest.raises(errors.NotFoundError):
        client.infer("a", {"x": x}, version="2")
    with pytest.raises(errors.InvalidError, match="unexpected shape"):
        client.infer("a", {"q_proj": x[:, :2]})


def test_models_of_the_open_inference_protocol(client, weights):
    assert client.get_server()["name"] == "bonsai-lora"
    assert client.get_server_live()["live"]
    assert client.get_server_ready()["ready"]
    for version in (None, "3"):
        model = client.get_model("a", version=version)
        assert model["versions"] == ["3"]
        assert {one["name"] for one in model["outputs"]} == set(SHAPES)
        assert client.get_model_ready("a", version=version)["ready"]
        assert client.get_model_config("a", version=version)["name"] == "a"
        (one,) = client.get_model_statistics("a", version=version)
        assert one["name"] == "a"
    assert {one["name"] for one in client.get_model_statistics()} == {"a", "b", "mixed"}
    assert {"a", "b"} <= {one["name"] for one in client.list_models()}
    assert client.unload_model("a") is None
    assert client.load_model("a") is None
    for call in (client.list_regions, client.unregister_regions):
        with pytest.raises(errors.UnsupportedFeatureError):
            call("region")
    with pytest.raises(errors.UnsupportedFeatureError):
        client.register_region("region", "/key", 4)


def test_a_call_of_ones_own(client):
    from bonsai_lora.client.call import Call, decode_json

    call = Call(method="GET", path="/openapi.json", decode=decode_json)
    assert client.send(call)["info"]["title"]
