"""Names of bases that adapters carry."""

import pytest

from bonsai_lora.formats.names import base_names


@pytest.mark.parametrize(
    ("carried", "base"),
    [
        ("Qwen3-8B", "Qwen3-8B"),
        ("Qwen/Qwen3-8B", "Qwen3-8B"),
        ("/data/models/Qwen3-8B/", "Qwen3-8B"),
        ("./Qwen3-8B", "Qwen3-8B"),
        ("C:\\models\\Qwen3-8B", "Qwen3-8B"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd", "Qwen3-8B"),
        ("out/my-run/checkpoint-1500", "my-run"),
        ("模型/Qwen3-8B", "Qwen3-8B"),
    ],
)
def test_a_path_of_any_system_names_a_base(carried, base):
    assert base_names(carried)[0] == carried
    assert base in base_names(carried)


def test_nothing_names_nothing():
    assert base_names("") == [""]
