"""Bases whose files are not a checkpoint: each refusal names the base; the others are not affected."""

import json

import numpy as np
import pytest

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.fit import check_tensor
from bonsai_lora.checkpoints.merged_tensor import Touched
from bonsai_lora.errors import InvalidBaseError, ShapeMismatchError
from bonsai_lora.formats import safetensors

WEIGHTS = safetensors.encode({"a": np.ones((2, 3), np.float32)})
INDEX = "model.safetensors.index.json"


def index(**files):
    return json.dumps({"weight_map": files}).encode()


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": WEIGHTS[:-1]},
        {"model.safetensors": WEIGHTS + b"\0"},
        {"model.safetensors": b"\xff" * 8},
        {"model.safetensors": b""},
        {"x.safetensors": WEIGHTS, "y.safetensors": WEIGHTS},
        {"x.safetensors": WEIGHTS, INDEX: b"[]"},
        {"x.safetensors": WEIGHTS, INDEX: index(a="x.safetensors", b="x.safetensors")},
        {"x.safetensors": WEIGHTS, INDEX: index(a="y.safetensors")},
    ],
    ids=[
        "cut off",
        "too long",
        "no header",
        "empty",
        "one tensor in two files",
        "an index of nothing",
        "an index with a tensor too many",
        "an index with a different file",
    ],
)
def test_broken_bases_are_refused_by_name(tmp_path, files):
    for base, content in (("good", {"model.safetensors": WEIGHTS}), ("broken", files)):
        (tmp_path / base).mkdir()
        for name, data in content.items():
            (tmp_path / base / name).write_bytes(data)
    bases = BaseFolder(tmp_path)
    with pytest.raises(InvalidBaseError, match="base 'broken'") as caught:
        bases.get("broken")
    assert caught.value.values == {"base": "broken"}
    assert bases.get("good").info("a").shape == (2, 3)


VOCABULARY = ["embed_tokens", "lm_head", "wte", "shared", "output"]


@pytest.mark.parametrize("name", [*VOCABULARY, "q_proj"])
def test_a_resized_vocabulary_is_recognized(tmp_path, name):
    (tmp_path / "b").mkdir()
    tensors = {name: np.ones((4, 3), np.float32)}
    (tmp_path / "b" / "model.safetensors").write_bytes(safetensors.encode(tensors))
    base = BaseFolder(tmp_path).get("b")
    for shape, is_resized in (((5, 3), name in VOCABULARY), ((5, 2), False), ((4, 2), False)):
        touched = Touched(replacement=np.ones(shape, np.float32))
        with pytest.raises(ShapeMismatchError) as caught:
            check_tensor(base, name, touched, is_one_set=True)
        assert caught.value.values == {"tensor": name, "got": list(shape), "expected": [4, 3]}
        assert ("resize_token_embeddings(5)" in caught.value.detail) == is_resized
