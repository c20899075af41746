"""Which files are a base, as transformers reads a folder."""

import json

import numpy as np
import pytest

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.errors import InvalidBaseError
from bonsai_lora.formats import safetensors

WEIGHT = {"model.norm.weight": np.ones(3, np.float32)}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "bases" / "b"
    made.mkdir(parents=True)
    (made / "config.json").write_text('{"model_type": "qwen3"}')
    return made


def write(path, tensors=WEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.encode(tensors))


def index(folder, **files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def opened(folder):
    return BaseFolder(folder.parent).get(folder.name)


def test_one_file_decides(folder):
    write(folder / "model.safetensors")
    for stray in ("model.fp16.safetensors", "model_old.safetensors", "consolidated.safetensors"):
        write(folder / stray)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    index(folder, **{"model.norm.weight": "model-00001-of-00002.safetensors"})
    base = opened(folder)
    assert sorted(base.files) == ["config.json", "model.safetensors"]
    assert base.ignored == [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model.safetensors.index.json",
        "model_old.safetensors",
        "pytorch_model.bin",
    ]


def test_without_it_the_index_decides(folder):
    write(folder / "model-00001-of-00001.safetensors")
    write(folder / "model.fp16.safetensors")
    index(folder, **{"model.norm.weight": "model-00001-of-00001.safetensors"})
    base = opened(folder)
    assert base.weight_map == {"model.norm.weight": "model-00001-of-00001.safetensors"}
    assert base.ignored == ["model.fp16.safetensors"]
    index(folder, **{"model.norm.weight": "model-00001-of-00001.safetensors", "x": "y"})
    with pytest.raises(InvalidBaseError, match="not in the named files"):
        opened(folder)


def test_two_files_with_one_tensor_and_no_index(folder):
    write(folder / "a.safetensors")
    write(folder / "b.safetensors")
    with pytest.raises(InvalidBaseError, match=r"a\.safetensors and b\.safetensors"):
        opened(folder)


def test_subfolders_are_files_of_the_base_but_other_models_are_not(folder):
    write(folder / "model.safetensors")
    write(folder / "2_Dense" / "model.safetensors", {"linear.weight": np.ones((2, 2), np.float32)})
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 2}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    write(folder / "original" / "consolidated.00.safetensors")
    write(folder / "checkpoint-500" / "model.safetensors")
    write(folder / "draft" / "model.safetensors")
    (folder / "draft" / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("hidden")
    base = opened(folder)
    assert sorted(base.files) == [
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "additional_chat_templates/tools.jinja",
        "config.json",
        "model.safetensors",
    ]
    assert list(base.weight_map) == ["model.norm.weight"]
    assert base.ignored == ["checkpoint-500/", "draft/", "original/"]


def test_folders_are_read_four_deep(folder):
    write(folder / "model.safetensors")
    (folder / "1" / "2" / "3" / "4" / "5").mkdir(parents=True)
    for name in ("1/2/3/4/x", "1/2/3/4/5/y"):
        (folder / name).write_text("")
    base = opened(folder)
    assert sorted(base.files) == ["1/2/3/4/x", "config.json", "model.safetensors"]
    assert base.ignored == ["1/2/3/4/5/"]


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "3", "", '["model"]'])
def test_a_subfolder_without_a_valid_configuration_is_no_model(folder, text):
    write(folder / "model.safetensors")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text(text)
    assert "sub/config.json" in opened(folder).files


def test_links_that_lead_out_are_not_followed(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    write(folder / "model.safetensors")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "inside.json").symlink_to(folder / "config.json")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder / "loop")
    base = opened(folder)
    assert sorted(base.files) == ["config.json", "inside.json", "model.safetensors"]
    assert base.ignored == ["folder", "loop", "notes.txt"]
    (folder / "model.safetensors").rename(tmp_path / "moved.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "moved.safetensors")
    with pytest.raises(InvalidBaseError, match="Links"):
        opened(folder)


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs(folder, tmp_path):
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    write(cache / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "out.txt").symlink_to(folder / "config.json")
    linked = folder.parent / "name"
    linked.symlink_to(snapshot)
    base = opened(linked)
    assert sorted(base.files) == ["model.safetensors"]
    assert base.ignored == ["out.txt"]
