"""Tensors that contradict an adapter's configuration: each part of each kind, one at a time."""

import json

import numpy as np
import pytest
from conftest import peft_config

from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.peft import decode_adapter
from bonsai_lora.formats.peft_config import decode_config

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
    found = decode_adapter(decode_config(json.dumps(config).encode()), named, "s")
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
def test_shapes_that_agree(kind):
    (adapter,) = decode(*made(kind)).values()
    assert (adapter.rank, adapter.d_in, adapter.d_out) == (R, D_IN, D_OUT)


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
def test_factors_of_another_rank_or_shape(kind, shapes):
    with pytest.raises(InvalidAdapterError, match=r"rank|not matrices|empty"):
        decode(*made(kind, **shapes))


@pytest.mark.parametrize("kind", [kind for kind, about in KINDS.items() if about[4]])
@pytest.mark.parametrize(
    "shape", [(), (1,), (D_OUT - 1,), (D_OUT + 1,), (1, D_OUT), (D_OUT, 1), (D_IN,)], ids=str
)
def test_vectors_of_another_shape(kind, shape):
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
