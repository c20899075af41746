"""GGUF LoRA files: what llama.cpp's rules make of them, and back."""

import gguf_files
import ml_dtypes
import numpy as np
import pytest

from bonsai_lora.checkpoints.gguf_lora import Model, encode_lora
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.cast import to_float32
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import BonsaiLoraError, InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.gguf import read_header, reader_of
from bonsai_lora.formats.gguf_lora import copied_bytes, count_modules, decode_lora
from bonsai_lora.formats.gguf_names import Heads
from bonsai_lora.formats.hadamard import Folding
from bonsai_lora.formats.peft import decode_adapter
from bonsai_lora.formats.peft_config import PeftConfig
from bonsai_lora.formats.peft_options import BaseOptions

LAYER = "model.layers.0."
Q = f"{LAYER}self_attn.q_proj"
KEY = "blk.0.attn_q.weight"
PAIRS = {
    "general.architecture": "qwen3",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": np.float32(16),
}


def f32(array):
    return "F32", array.shape, array.astype("<f4").tobytes()


def halves(rng, name=KEY, a_shape=(4, 64), b_shape=(32, 4)):
    return {
        f"{name}.lora_a": f32(rng.standard_normal(a_shape)),
        f"{name}.lora_b": f32(rng.standard_normal(b_shape)),
    }


def decode(raw, architecture=None, heads=None):
    read = reader_of(raw)
    return decode_lora(read_header(read, len(raw)), read, architecture, heads)


def set_of(raw, **options):
    found = decode(raw, **options)
    return decode_adapter(PeftConfig(found.config), found.tensors, "mine").lora_set


def peft_set(tensors, **config):
    names = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    names.setdefault("target_modules", sorted({key.split(".")[-3] for key in tensors}))
    return decode_adapter(PeftConfig(names), tensors, "mine").lora_set


def linear(rng, module=Q, rank=4, d_in=64, d_out=32, dtype=np.float32):
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": rng.standard_normal((rank, d_in)).astype(dtype),
        f"{prefix}.lora_B.weight": rng.standard_normal((d_out, rank)).astype(dtype),
    }


def encoded(lora_set, model=Model("qwen3"), dtype="F32", raw=None, folding=None):  # noqa: B008
    file = encode_lora(lora_set, BaseOptions.of(raw), model, dtype, '"tag"', folding)
    file.check_values()
    content = b"".join(bytes(piece()) for piece in file.pieces(0, file.size_bytes))
    assert len(content) == file.size_bytes
    return file, content


def deltas(lora_set):
    return {
        name: one.scaling * to_float32(one.b_matrix).astype(float) @ to_float32(one.a_matrix)
        for name, one in lora_set.registry.adapters.items()
    }


def assert_same(got, expected, tolerance=1e-6):
    got, expected = deltas(got), deltas(expected)
    assert got.keys() == expected.keys()
    for name, one in expected.items():
        assert np.linalg.norm(got[name] - one) <= tolerance * np.linalg.norm(one)


@pytest.mark.parametrize("alpha", [16, 0, None, -3])
def test_the_scale_is_alpha_over_the_rank_of_each_tensor(rng, alpha):
    pairs = {key: one for key, one in PAIRS.items() if key != "adapter.lora.alpha"}
    if alpha is not None:
        pairs["adapter.lora.alpha"] = np.float32(alpha)
    tensors = halves(rng) | halves(rng, "blk.3.ffn_up.weight", (2, 64), (96, 2))
    adapters = set_of(gguf_files.file_of(pairs, tensors)).registry.adapters
    assert adapters[Q].scaling == (alpha / 4 if alpha else 1)
    assert adapters["model.layers.3.mlp.up_proj"].scaling == (alpha / 2 if alpha else 1)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"up_proj": 3}},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True},
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_delta_survives_the_round_trip(rng, config, dtype):
    rank = config.get("rank_pattern", {}).get("up_proj", 4)
    tensors = linear(rng, dtype=dtype) | linear(rng, f"{LAYER}mlp.up_proj", rank, dtype=dtype)
    lora_set = peft_set(tensors, **config)
    _, content = encoded(lora_set)
    assert_same(set_of(content), lora_set)


def cases_of_ranges(rng):
    """Sets with everything that rows are made of, and the models that they are for."""
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    experts = linear(rng, f"{LAYER}mlp.experts.2.up_proj", 4) | linear(
        rng, f"{LAYER}mlp.experts.0.up_proj", 2
    )
    up = f"{LAYER}mlp.up_proj"
    signs = {64: rng.choice([-1, 1], 64).astype(np.float32)}
    return {
        "plain": (
            peft_set(linear(rng) | linear(rng, up, 3, 33, 7), rank_pattern={"up_proj": 3}),
            Model("qwen3"),
            None,
        ),
        "embedding": (
            peft_set(
                {
                    f"{embedding}A": rng.standard_normal((4, 50)).astype(np.float32),
                    f"{embedding}B": rng.standard_normal((32, 4)).astype(np.float32),
                },
                target_modules=["embed_tokens"],
            ),
            Model("qwen3", is_tied=False),
            None,
        ),
        "experts": (
            peft_set(experts, rank_pattern={"experts.0.up_proj": 2}, use_rslora=True),
            Model("qwen3moe", experts=4),
            None,
        ),
        "ordered rows": (peft_set(linear(rng)), Model("llama", Heads(queries=4)), None),
        "folded": (
            peft_set(linear(rng, up)),
            Model("qwen3"),
            Folding(16, signs, frozenset({"blk.0.ffn_up.weight"})),
        ),
    }


def test_an_adapter_of_a_folded_embedding_is_refused(rng):
    lora_set, model, _ = cases_of_ranges(rng)["embedding"]
    folding = Folding(16, {}, frozenset({"token_embd.weight"}))
    with pytest.raises(UnsupportedAdapterError, match="rows are Hadamard-folded"):
        encoded(lora_set, model, folding=folding)
    assert encoded(lora_set, model, folding=Folding(16, {}, frozenset({KEY})))


@pytest.mark.parametrize("case", ["plain", "embedding", "experts", "ordered rows", "folded"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
def test_any_range_is_that_slice_of_the_file(rng, case, dtype, monkeypatch):
    lora_set, model, folding = cases_of_ranges(rng)[case]
    _, content = encoded(lora_set, model, dtype, folding=folding)
    monkeypatch.setattr("bonsai_lora.checkpoints.parts.BLOCK_VALUES", 100)
    file, again = encoded(lora_set, model, dtype, folding=folding)
    assert again == content
    assert len([*file.pieces(0, file.size_bytes)]) > 4, "more than the head and two tensors"
    for start in range(0, len(content), 37):
        for stop in (start + 1, start + 1000, len(content)):
            got = b"".join(bytes(piece()) for piece in file.pieces(start, min(stop, len(content))))
            assert got == content[start:stop]


@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 1e-3), ("BF16", 6e-3), ("Q8_0", 2e-2)])
def test_smaller_types(rng, dtype, tolerance):
    lora_set = peft_set(linear(rng))
    _, content = encoded(lora_set, dtype=dtype)
    header = read_header(reader_of(content), len(content))
    kinds = [one.type.name for one in header.tensors.values()]
    assert kinds == (["Q8_0", "F16"] if dtype == "Q8_0" else [dtype, dtype])
    assert_same(set_of(content), lora_set, tolerance)


def test_values_beyond_the_type_are_refused(rng):
    tensors = linear(rng)
    tensors[f"base_model.model.{Q}.lora_A.weight"] *= 1e5
    with pytest.raises(UnsupportedAdapterError, match="beyond the largest F16"):
        encoded(peft_set(tensors), dtype="F16")
    assert encoded(peft_set(tensors), dtype="F32")
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = 3.4e38  # infinite if rounded to BF16
    with pytest.raises(UnsupportedAdapterError, match="beyond the largest BF16"):
        encoded(peft_set(tensors), dtype="BF16")


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [("F16", 65504, 65536), ("BF16", 0xFF << 120, 0x1FF << 119), ("Q8_0", 8319008, 8319009)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_of_a_type_is_written(rng, dtype, largest, beyond, sign):
    tensors = linear(rng)
    key = f"base_model.model.{Q}.lora_A.weight"
    tensors[key][1, 5] = np.float32(sign * largest)
    _, content = encoded(peft_set(tensors), dtype=dtype)
    found = decode(content).tensors[key].astype(np.float32)
    assert np.isfinite(found).all()
    assert found[1, 5] == pytest.approx(sign * largest, rel=1e-6)
    tensors[key][1, 5] = np.float32(sign * beyond)
    with pytest.raises(UnsupportedAdapterError, match=f"beyond the largest {dtype}"):
        encoded(peft_set(tensors), dtype=dtype)


@pytest.mark.parametrize("way", ["scaling", "folding"])
def test_float32_overflows_only_where_values_are_computed(rng, way):
    """Factors are copied as they are, unless B is scaled or A folded."""
    half = "A" if way == "folding" else "B"
    tensors = linear(rng)
    tensors[f"base_model.model.{Q}.lora_{half}.weight"][:] = 3e38
    plain = peft_set(tensors, lora_alpha=64)
    assert encoded(plain)
    folding = Folding(16, {64: np.ones(64, np.float32)}, frozenset({KEY}))
    with pytest.raises(UnsupportedAdapterError, match="beyond the largest F32"):
        if way == "folding":
            encoded(plain, folding=folding)
        else:
            other = linear(rng, f"{LAYER}mlp.up_proj")
            encoded(peft_set(tensors | other, lora_alpha=64, alpha_pattern={"up_proj": 1}))


@pytest.mark.parametrize("base", ["org/model", ""])
def test_the_keys_of_a_file_say_what_it_is(rng, base):
    lora_set = peft_set(linear(rng), base_model_name_or_path=base)
    _, content = encoded(lora_set)
    header = read_header(reader_of(content), len(content))
    expected = {
        **PAIRS,
        "adapter.lora.alpha": 8.0,
        "general.name": "mine",
        "general.quantization_version": 2,
        **(
            {"general.base_model.count": 1, "general.base_model.0.name": "org/model"}
            if base
            else {}
        ),
    }
    assert {key: header.get(key) for key in header.pairs} == expected


def test_the_order_of_the_adapters_makes_no_difference(rng):
    modules = [
        f"model.layers.{layer}.mlp.{one}_proj" for layer in (10, 2) for one in ("up", "down")
    ]
    adapters = [linear(rng, module) for module in modules]
    contents = []
    for order in (adapters, adapters[::-1]):
        tensors = {key: one for part in order for key, one in part.items()}
        contents.append(encoded(peft_set(tensors))[1])
    assert contents[0] == contents[1]
    header = read_header(reader_of(contents[0]), len(contents[0]))
    assert [key.split(".")[1] for key in header.tensors] == ["2"] * 4 + ["10"] * 4, "by layer"


def test_a_set_without_adapters_is_refused():
    empty = BonsaiLoraSet(LoraRegistry(LoraConfig(4, 8.0), {}), "", "mine", {})
    with pytest.raises(UnsupportedAdapterError, match="has no adapters") as caught:
        encoded(empty)
    assert caught.value.values == {"set": "mine"}


def test_experts_of_one_stack_have_one_shape(rng):
    modules = [f"{LAYER}mlp.experts.{one}.up_proj" for one in (0, 1)]
    tensors = linear(rng, modules[0]) | linear(rng, modules[1], d_in=32)
    with pytest.raises(UnsupportedAdapterError, match=r"shapes \[\(32, 32\), \(64, 32\)\]"):
        encoded(peft_set(tensors), Model("qwen3moe"))


def test_rows_of_query_heads_are_permuted_for_llama(rng):
    lora_set = peft_set(linear(rng, d_out=32))
    model = Model("llama", Heads(4, 2))
    _, content = encoded(lora_set, model)
    header = read_header(reader_of(content), len(content))
    info = header.tensors[f"{KEY}.lora_b"]
    stored = np.frombuffer(content[info.start : info.stop], "<f4").reshape(info.shape)
    ours = lora_set.registry.adapters[Q].b_matrix
    # llama.cpp, conversion of llama: reshape(heads, 2, width / 2, …).swapaxes(1, 2)
    assert np.array_equal(stored, ours.reshape(4, 2, 4, 4).swapaxes(1, 2).reshape(32, 4))
    assert_same(set_of(content, heads=Heads(4, 2)), lora_set, 0)
    with pytest.raises(UnsupportedAdapterError, match="head counts are unknown"):
        set_of(content)
    with pytest.raises(UnsupportedAdapterError, match="head counts are unknown"):
        encoded(lora_set, Model("llama"))


SSM_OUT = "blk.0.ssm_out.weight"


@pytest.mark.parametrize(
    "folding",
    [None, Folding(1, {}, frozenset({SSM_OUT})), Folding(1, {}, frozenset({SSM_OUT}), True)],
    ids=["not folded", "folded", "grouped"],
)
def test_columns_of_value_heads_are_permuted_unless_the_base_has_them_grouped(rng, folding):
    lora_set = peft_set(linear(rng, f"{LAYER}linear_attn.out_proj", d_in=48))
    model = Model("qwen35", Heads(linear_keys=2, linear_values=6))
    _, content = encoded(lora_set, model, folding=folding)
    info = read_header(reader_of(content), len(content)).tensors[f"{SSM_OUT}.lora_a"]
    stored = np.frombuffer(content[info.start : info.stop], "<f4").reshape(info.shape)
    (adapter,) = lora_set.registry.adapters.values()
    by_place = adapter.a_matrix.reshape(4, 2, 3, 8).swapaxes(1, 2).reshape(4, 48)
    is_grouped = folding is not None and folding.is_grouped
    assert np.array_equal(stored, adapter.a_matrix if is_grouped else by_place)


def test_experts_of_different_ranks_become_one_stack(rng):
    modules = [f"{LAYER}mlp.experts.{one}.up_proj" for one in (0, 2)]
    tensors = linear(rng, modules[0], 4) | linear(rng, modules[1], 2)
    lora_set = peft_set(tensors, rank_pattern={"experts.2.up_proj": 2})
    _, content = encoded(lora_set, Model("qwen3moe", experts=5))
    header = read_header(reader_of(content), len(content))
    assert header.tensors["blk.0.ffn_up_exps.weight.lora_a"].shape == (5, 4, 64)
    assert header.tensors["blk.0.ffn_up_exps.weight.lora_b"].shape == (5, 32, 4)
    found = deltas(set_of(content))
    expected = deltas(lora_set)
    for expert in range(5):
        name = f"{LAYER}mlp.experts.{expert}.up_proj"
        assert np.allclose(found[name], expected.get(name, 0), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedAdapterError, match="numbers below 2"):
        encoded(lora_set, Model("qwen3moe", experts=2))


@pytest.mark.parametrize(
    ("leaf", "names"), [("down_proj", ["down_proj"]), ("gate_up_proj", ["gate_proj", "up_proj"])]
)
def test_fused_experts_become_the_stacks_of_their_tensors(rng, leaf, names):
    experts, rank, d_in, d_out = 3, 2, 64, 32
    a_matrix = rng.standard_normal((experts * rank, d_in)).astype(np.float32)
    b_matrix = rng.standard_normal((d_out, rank * experts)).astype(np.float32)
    config = LoraConfig(rank, 4.0)
    fused = LoraAdapter(config, a_matrix, b_matrix, 2.0, experts=experts)
    registry = LoraRegistry(config, {f"{LAYER}mlp.experts": fused})
    lora_set = BonsaiLoraSet(registry, "", "mine", {})
    raw = {"target_parameters": [f"mlp.experts.{leaf}"]}
    _, content = encoded(lora_set, Model("qwen3moe", experts=experts), raw=raw)
    found = deltas(set_of(content))
    assert len(found) == experts * len(names)
    a_matrix, b_matrix = a_matrix.reshape(experts, rank, d_in), b_matrix.reshape(d_out, rank, -1)
    for expert in range(experts):
        delta = 2.0 * b_matrix[:, :, expert].astype(float) @ a_matrix[expert]
        for name, rows in zip(names, np.split(delta, len(names)), strict=True):
            got = found[f"{LAYER}mlp.experts.{expert}.{name}"]
            assert np.allclose(got, rows, rtol=1e-5, atol=1e-5)


def test_the_number_of_an_expert_does_not_make_a_stack_large(rng):
    lora_set = peft_set(linear(rng, f"{LAYER}mlp.experts.999999999.up_proj"))
    with pytest.raises(UnsupportedAdapterError, match=r"up to 999999999; .* below 4096"):
        encoded(lora_set, Model("qwen3moe"))


def test_an_untied_embedding_is_transposed(rng):
    prefix = "base_model.model.model.embed_tokens"
    tensors = {
        f"{prefix}.lora_embedding_A": rng.standard_normal((4, 50)).astype(np.float32),
        f"{prefix}.lora_embedding_B": rng.standard_normal((64, 4)).astype(np.float32),
    }
    lora_set = peft_set(tensors, target_modules=["embed_tokens"])
    _, content = encoded(lora_set, Model("qwen3", is_tied=False))
    header = read_header(reader_of(content), len(content))
    assert header.tensors["token_embd.weight.lora_a"].shape == (50, 4)
    assert_same(set_of(content), lora_set, 0)
    for tied in (True, None):
        with pytest.raises(UnsupportedAdapterError, match=r"llama\.cpp aborts"):
            encoded(lora_set, Model("qwen3", is_tied=tied))


def test_folding_changes_a_so_that_folded_weights_give_the_same(rng):
    signs = rng.choice([-1.0, 1.0], 64).astype(np.float32)
    folding = Folding(16, {64: signs}, frozenset({KEY}))
    lora_set = peft_set(linear(rng))
    _, content = encoded(lora_set, folding=folding)
    header = read_header(reader_of(content), len(content))
    info = header.tensors[f"{KEY}.lora_a"]
    stored = np.frombuffer(content[info.start : info.stop], "<f4").reshape(info.shape)
    matrix = np.ones((1, 1))
    while len(matrix) < 16:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    inputs = rng.standard_normal(64)
    transformed = np.kron(np.eye(4), matrix / 4) @ (signs * inputs)
    ours = lora_set.registry.adapters[Q].a_matrix
    assert np.allclose(stored @ transformed, ours @ inputs, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedAdapterError, match=r"bonsai_lora\.folded"):
        decode(content)


@pytest.mark.parametrize(
    ("config", "extra", "reason"),
    [
        ({"use_dora": True}, {"lora_magnitude_vector": (32,)}, "cannot express DoRA"),
        ({"lora_bias": True}, {"lora_B.bias": (32,)}, "cannot express a bias"),
        ({"fan_in_fan_out": True}, {}, "cannot express fan_in_fan_out"),
        ({"modules_to_save": ["norm"]}, {"../model.norm.weight": (64,)}, "replaced parameters"),
    ],
)
def test_what_a_gguf_lora_cannot_express(rng, config, extra, reason):
    tensors = linear(rng)
    for name, shape in extra.items():
        key = f"base_model.model.{Q}.{name}"
        key = f"base_model.model.{name[3:]}" if name.startswith("../") else key
        tensors[key] = np.ones(shape, np.float32)
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    lora_set = decode_adapter(PeftConfig(raw), tensors, "mine").lora_set
    with pytest.raises(UnsupportedAdapterError, match=reason):
        encoded(lora_set, raw=raw)


def test_modules_without_a_name_in_gguf(rng):
    with pytest.raises(UnsupportedAdapterError, match=r"'q_proj\.weight' is not a matrix with"):
        encoded(peft_set(linear(rng, "q_proj")))
    norm = f"{LAYER}input_layernorm"
    with pytest.raises(UnsupportedAdapterError, match=r"input_layernorm\.weight' is not a matrix"):
        encoded(peft_set(linear(rng, norm, d_in=64, d_out=1)))


def changed(**pairs):
    names = {key.replace("__", "."): value for key, value in pairs.items()}
    return {key: one for key, one in {**PAIRS, **names}.items() if one is not None}


HOSTILE = {
    "a model": (changed(general__type="model"), None, "is a model, not an adapter"),
    "no type": (changed(general__type=None), None, "is a model, not an adapter"),
    "a different adapter": (changed(adapter__type="vera"), None, "'vera'; only lora"),
    "an activated LoRA": (
        changed(adapter__alora__invocation_tokens=np.array([1], np.uint32)), None, "activated LoRA",
    ),
    "a part": (changed(split__count=np.uint16(2)), None, "part of a split file"),
    "alpha of a different type": (
        changed(adapter__lora__alpha=np.uint32(16)), None, "of type UINT32; expected FLOAT32",
    ),
    "alpha NaN": (changed(adapter__lora__alpha=np.float32("nan")), None, "alpha is nan"),
    "an unknown architecture": (changed(general__architecture="mamba"), None, "'mamba' are unknown"),
    "no tensors": (PAIRS, {}, "no lora_a and lora_b"),
    "one half": (PAIRS, {f"{KEY}.lora_a": (4, 64)}, "attn_q.weight.lora_b is missing"),
    "exchanged halves": (
        PAIRS, {f"{KEY}.lora_a": (32, 4), f"{KEY}.lora_b": (4, 64)}, "expected (r, d_in)",
    ),
    "different ranks": (
        PAIRS, {f"{KEY}.lora_a": (4, 64), f"{KEY}.lora_b": (32, 5)}, "expected (r, d_in)",
    ),
    "a bias": (PAIRS, {"blk.0.attn_q.bias": (32,)}, "neither NAME.lora_a nor NAME.lora_b"),
    "an unknown name": (
        PAIRS, {"blk.0.x.weight.lora_a": (4, 64), "blk.0.x.weight.lora_b": (32, 4)},
        "'blk.0.x.weight' is unknown for architecture 'qwen3'",
    ),
    "a norm": (
        PAIRS, {"blk.0.attn_norm.weight.lora_a": (4, 64), "blk.0.attn_norm.weight.lora_b": (1, 4)},
        "applies no adapter to 'blk.0.attn_norm.weight'",
    ),
    "a stack that is none": (
        PAIRS, {f"{KEY}.lora_a": (2, 4, 64), f"{KEY}.lora_b": (2, 32, 4)}, "expected (r, d_in)",
    ),
    "rank 0": (PAIRS, {f"{KEY}.lora_a": (0, 64), f"{KEY}.lora_b": (32, 0)}, "expected (r, d_in)"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_the_reason(rng, case):
    pairs, shapes, reason = HOSTILE[case]
    tensors = (
        halves(rng)
        if shapes is None
        else {name: f32(np.ones(shape)) for name, shape in shapes.items()}
    )
    with pytest.raises((InvalidAdapterError, UnsupportedAdapterError)) as caught:
        decode(gguf_files.file_of(pairs, tensors))
    assert reason in caught.value.detail


def test_a_file_cut_anywhere_is_refused(rng):
    _, content = encoded(peft_set(linear(rng)))
    for length in range(0, len(content), 61):
        with pytest.raises(BonsaiLoraError):
            decode(content[:length])


def test_what_decoding_makes_is_counted_before(rng):
    stack = {"blk.0.ffn_up_exps.weight": ((9, 4, 64), (9, 32, 4))}
    tensors = halves(rng)
    for name, shapes in stack.items():
        tensors |= halves(rng, name, *shapes)
    small = bytes(34 * 64 // 32 * 4)
    tensors["blk.0.attn_k.weight.lora_a"] = ("Q8_0", (4, 64), small)
    tensors["blk.0.attn_k.weight.lora_b"] = f32(np.ones((16, 4)))
    raw = gguf_files.file_of(changed(general__architecture="qwen3moe"), tensors)
    header = read_header(reader_of(raw), len(raw))
    assert count_modules(header) == len(decode(raw).tensors) // 2 == 11
    assert copied_bytes(header) == 4 * 4 * 64
    # Query and key rows of llama are put in order, which makes copies.
    reordered = 4 * (4 * 64 + 32 * 4) + 4 * (4 * 64 + 16 * 4)
    assert copied_bytes(header, "llama") == reordered


def test_norms_are_ignored_as_by_llamacpp_and_the_architecture_can_be_given(rng):
    tensors = {**halves(rng), "blk.0.attn_norm.weight": f32(np.ones(64))}
    raw = gguf_files.file_of(changed(general__architecture="qwen9"), tensors)
    found = decode(raw, architecture="qwen3")
    assert found.ignored_keys == ["blk.0.attn_norm.weight"]
    assert len(found.tensors) == 2
