"""Bases whose files are not a checkpoint: each refusal names the base; the others are not affected."""

import json
import os

import numpy as np
import pytest

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.fit import check_tensor
from bonsai_lora.checkpoints.merged_tensor import Touched
from bonsai_lora.errors import (
    BaseChangedError,
    BaseNotFoundError,
    InvalidBaseError,
    ShapeMismatchError,
)
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
        {"x.safetensors": WEIGHTS, INDEX: b'{"a":' * 2000 + b"0" + b"}" * 2000},
        {"x.safetensors": WEIGHTS, INDEX: b'{"weight_map":{"a":' + b"[" * 2000 + b"]" * 2000},
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
        "an index that is nested deeply",
        "an index with a deeply nested list as file",
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


@pytest.mark.parametrize("name", ["b/model.safetensors", "b.gguf"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / "b").mkdir()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(
        InvalidBaseError, match=r"of base 'b': the file is a Git LFS .*git lfs pull"
    ):
        BaseFolder(tmp_path).get("b")


def test_the_files_of_a_base_that_was_removed_are_closed(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").write_bytes(WEIGHTS)
    bases = BaseFolder(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert bases.get("b") is bases.get("b")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(BaseNotFoundError):
        bases.get("b")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_changes_is_named_with_its_base(tmp_path):
    (tmp_path / "b").mkdir()
    path = tmp_path / "b" / "model.safetensors"
    path.write_bytes(WEIGHTS)
    tensor = BaseFolder(tmp_path).get("b").tensor("a")
    assert tensor[slice(0, 2), slice(0, 3)].tolist() == [[1, 1, 1], [1, 1, 1]]
    os.truncate(path, 10)
    with pytest.raises(BaseChangedError, match=r"^model\.safetensors of base 'b' became shorter"):
        tensor[slice(0, 2), slice(0, 3)]


def test_a_folder_that_is_called_like_a_file_of_weights_is_none(tmp_path):
    (tmp_path / "b" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "c.gguf").mkdir()
    bases = BaseFolder(tmp_path)
    assert bases.names() == []
    for name in ("b", "c"):
        with pytest.raises(BaseNotFoundError):
            bases.get(name)


@pytest.mark.parametrize("size", [40_000, 1 << 20])
def test_a_base_is_identified_by_samples_of_its_files(tmp_path, size):
    """An image build gives all versions of a file the same time, and their headers are the same."""
    (tmp_path / "b").mkdir()
    path = tmp_path / "b" / "model.safetensors"
    content = safetensors.encode({"a": np.zeros(size // 4, np.float32)})

    def digest_of(raw):
        path.with_suffix(".new").write_bytes(raw)
        os.utime(path.with_suffix(".new"), ns=(10**18, 10**18))
        path.with_suffix(".new").replace(path)
        return BaseFolder(tmp_path).get("b").digest

    first = digest_of(content)
    assert digest_of(content) == first
    changed = set()
    # Of every sixteenth the first 4 KiB: all of a small file.
    starts = range(0, len(content), max(4096, len(content) // 16))
    places = [
        place for start in starts for place in (start, start + 4095) if 200 < place < len(content)
    ]
    for place in places:
        raw = bytearray(content)
        raw[place] = 1
        changed.add(digest_of(bytes(raw)))
    assert len(changed - {first}) == len(places) >= 16


@pytest.mark.parametrize(("size", "is_read"), [(1 << 24, True), ((1 << 24) + 1, False)])
def test_a_configuration_of_up_to_16_mib_is_read(tmp_path, size, is_read):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "b" / "config.json").write_text('{"model_type": "qwen3"}'.ljust(size))
    assert BaseFolder(tmp_path).get("b").model_type == ("qwen3" if is_read else "")


@pytest.mark.parametrize(("more", "is_read"), [(0, True), (1, False)])
def test_an_index_has_a_longest_length(tmp_path, monkeypatch, more, is_read):
    content = index(a="x.safetensors")
    for module in ("folder", "safetensors_base"):
        monkeypatch.setattr(f"bonsai_lora.checkpoints.{module}.MOST_JSON_BYTES", len(content))
    (tmp_path / "b").mkdir()
    other = safetensors.encode({"b": np.ones(2, np.float32)})
    for name, raw in (("x.safetensors", WEIGHTS), ("y.safetensors", other)):
        (tmp_path / "b" / name).write_bytes(raw)
    (tmp_path / "b" / INDEX).write_bytes(content + b" " * more)
    if is_read:
        assert [*BaseFolder(tmp_path).get("b").tensor_names] == ["a"]
    else:
        with pytest.raises(InvalidBaseError, match="is not a valid index"):
            BaseFolder(tmp_path).get("b")


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
