"""Tensors that contradict an adapter's configuration: each part of each kind, one at a time."""

import numpy as np
import pytest
from conftest import peft_config

from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.peft import decode_adapter, set_tensors
from bonsai_lora.formats.peft_config import PeftConfig

R, D_IN, D_OUT = 4, 6, 5
LINEAR, EMBEDDING = "model.q_proj", "model.embed_tokens"
KINDS = {
    # Kind: module, changes of the configuration, and the names of A, B and its vector.
    "plain": (LINEAR, {}, "lora_A.weight", "lora_B.weight", None),
    "embedding": (EMBEDDING, {}, "lora_embedding_A", "lora_embedding_B", None),
    "DoRA": (LINEAR, {"use_dora": True}, "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "DoRA of an embedding": (EMBEDDING, {"use_dora": True}, "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    "lora_bias": (LINEAR, {"lora_bias": True}, "lora_A.weight", "lora_B.weight", "lora_B.bias"),
}  # fmt: skip


def decode(config, tensors):
    named = {f"base_model.model.{name}": one for name, one in tensors.items()}
    found = decode_adapter(PeftConfig(config), named, "s")
    return found.lora_set.registry.adapters


def made(kind, a_shape=(R, D_IN), b_shape=(D_OUT, R), vector_shape=(D_OUT,)):
    module, changes, a, b, vector = KINDS[kind]
    config = peft_config(r=R, target_modules=[module.rpartition(".")[2]], **changes)
    tensors = {
        f"{module}.{a}": np.ones(a_shape, np.float32),
        f"{module}.{b}": np.ones(b_shape, np.float32),
    }
    if vector is not None:
        tensors[f"{module}.{vector}"] = np.ones(vector_shape, np.float32)
    return config, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_agree_come_back_under_their_names(kind):
    config, tensors = made(kind)
    (adapter,) = decode(config, tensors).values()
    assert (adapter.rank, adapter.d_in, adapter.d_out) == (R, D_IN, D_OUT)
    named = {f"base_model.model.{name}": one for name, one in tensors.items()}
    lora_set = decode_adapter(PeftConfig(config), named, "s").lora_set
    back = set_tensors(lora_set)
    assert back.keys() == named.keys()
    assert all(back[name] is one for name, one in named.items())


def test_tensors_of_several_modules_come_back():
    named = {}
    for module in ("a.q_proj", "b.q_proj", "c.q_proj"):
        for half, shape in (("A", (R, D_IN)), ("B", (D_OUT, R))):
            named[f"base_model.model.{module}.lora_{half}.weight"] = np.ones(shape, np.float32)
    named["base_model.model.lm_head.weight"] = np.ones((3, 3), np.float32)
    named["base_model.model.norm.weight"] = np.ones(3, np.float32)
    config = peft_config(r=R, modules_to_save=["lm_head", "norm"])
    found = decode_adapter(PeftConfig(config), named, "s")
    back = set_tensors(found.lora_set)
    assert back.keys() == named.keys()
    assert all(back[name] is one for name, one in named.items())


COPY = np.ones((10, 6), np.float32)


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        # peft saves the weights of a resized vocabulary, in a wrapper only if they are adapted.
        ("model.embed_tokens.weight", {}, "kept"),
        ("model.embed_tokens.base_layer.weight", {}, "lost"),
        ("lm_head.base_layer.weight", {}, "lost"),
        ("model.other.base_layer.weight", {}, "lost"),
        ("model.embed_tokens.base_layer.bias", {}, "lost"),
        ("model.embed_tokens.weight", {"modules_to_save": ["embed_tokens"]}, "kept"),
        ("model.other.weight", {"modules_to_save": ["other"]}, "kept"),
        ("model.other.inner.weight", {"modules_to_save": ["other"]}, "kept"),
        ("model.other.weight", {"modules_to_save": ["the"]}, "kept"),
        ("model.other.weight", {"modules_to_save": ["ther"]}, "kept"),  # as peft: it ends so
        ("model.other.weight", {"modules_to_save": ["model.other"]}, "kept"),
        ("model.q_proj.bias", {"bias": "all"}, "kept"),
        ("model.q_proj.bias", {"bias": "lora_only"}, "kept"),
        ("model.q_proj.bias", {"bias": "none"}, "lost"),
        ("model.q_proj.bias", {}, "lost"),
        ("model.norm.bias", {"bias": "all"}, "kept"),
        ("model.norm.bias", {"bias": "lora_only"}, "lost"),
        ("model.q_proj.weight", {"bias": "all"}, "lost"),
    ],
)
def test_tensors_beside_the_factors(name, changes, found):
    config, tensors = made("plain")
    config |= changes
    named = {f"base_model.model.{one}": array for one, array in {**tensors, name: COPY}.items()}
    checked = PeftConfig(config)
    if found == "lost":
        with pytest.raises(UnsupportedAdapterError, match="would be lost"):
            decode_adapter(checked, named, "s")
        return
    adapter = decode_adapter(checked, named, "s")
    assert adapter.ignored_keys == []
    assert list(adapter.lora_set.replacements) == [name]
    # The bias of an adapted layer is inside peft's wrapper, where peft looks for it.
    wrapped = {one.replace("q_proj.bias", "q_proj.base_layer.bias") for one in named}
    assert set_tensors(adapter.lora_set).keys() == wrapped


def test_a_weight_beside_its_adapted_layer_is_refused():
    """peft saves it as the layer's base_layer.weight, and would ignore it here."""
    config, tensors = made("embedding")
    named = {f"base_model.model.{one}": array for one, array in tensors.items()}
    named[f"base_model.model.{EMBEDDING}.weight"] = COPY
    with pytest.raises(UnsupportedAdapterError, match="would be lost"):
        decode_adapter(PeftConfig(config), named, "s")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shapes",
    [
        {"a_shape": (R - 1, D_IN)},
        {"a_shape": (R + 1, D_IN)},
        {"b_shape": (D_OUT, R - 1)},
        {"b_shape": (D_OUT, R + 1)},
        {"a_shape": (R - 1, D_IN), "b_shape": (D_OUT, R - 1)},
        {"a_shape": (R + 1, D_IN), "b_shape": (D_OUT, R + 1)},
        {"a_shape": (0, D_IN), "b_shape": (D_OUT, 0)},
        {"a_shape": (D_IN, R), "b_shape": (R, D_OUT)},
        {"a_shape": (R * D_IN,)},
        {"b_shape": (D_OUT * R,)},
        {"a_shape": (1, R, D_IN)},
        {"b_shape": (D_OUT, R, 1)},
        {"a_shape": ()},
        {"b_shape": ()},
    ],
    ids=str,
)
def test_factors_of_a_different_rank_or_shape(kind, shapes):
    with pytest.raises(InvalidAdapterError, match=r"rank|expected \(r, d_in\) and|empty"):
        decode(*made(kind, **shapes))


@pytest.mark.parametrize("kind", [kind for kind, about in KINDS.items() if about[4]])
@pytest.mark.parametrize(
    "shape", [(), (1,), (D_OUT - 1,), (D_OUT + 1,), (1, D_OUT), (D_OUT, 1), (D_IN,)], ids=str
)
def test_vectors_of_a_different_shape(kind, shape):
    with pytest.raises(InvalidAdapterError, match="shape"):
        decode(*made(kind, vector_shape=shape))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_missing(kind):
    config, tensors = made(kind)
    for key in tensors:
        with pytest.raises(InvalidAdapterError):
            decode(config, {name: one for name, one in tensors.items() if name != key})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_no_numbers(kind, value, dtype):
    """In every part, at its first and at its last place."""
    config, tensors = made(kind)
    for key, array in tensors.items():
        for place in (0, -1):
            bad = array.astype(dtype)
            bad.reshape(-1)[place] = value
            with pytest.raises(InvalidAdapterError, match="NaN or infinity"):
                decode(config, {**tensors, key: bad})


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_refused_in_every_part(kind):
    config, tensors = made(kind)
    for key, array in tensors.items():
        with pytest.raises(UnsupportedAdapterError, match="F64"):
            decode(config, {**tensors, key: array.astype(np.float64)})


def test_kinds_that_peft_does_not_combine():
    """It raises for both when the configuration is read (LoraConfig, Embedding.update_layer)."""
    config, tensors = made("DoRA")
    tensors[f"{LINEAR}.lora_B.bias"] = np.ones(D_OUT, np.float32)
    with pytest.raises(UnsupportedAdapterError, match="lora_bias and use_dora"):
        decode({**config, "lora_bias": True}, tensors)
    config, tensors = made("embedding")
    tensors[f"{EMBEDDING}.lora_B.bias"] = np.ones(D_OUT, np.float32)
    with pytest.raises(UnsupportedAdapterError, match="is an embedding"):
        decode({**config, "lora_bias": True}, tensors)
