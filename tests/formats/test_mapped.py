"""A mapped file: all of it, read-only, and nothing of an empty one."""

import pytest

from bonsai_lora.formats.mapped import map_file


@pytest.mark.parametrize("content", [b"", b"x", b"xy" * 5000])
def test_a_file_as_memory(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        mapped = map_file(file)
    assert bytes(mapped) == content
    assert mapped.readonly


def test_a_mapping_outlives_its_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    with path.open("rb") as file:
        mapped = map_file(file)
    path.unlink()
    assert bytes(mapped) == b"kept"


def test_a_file_open_for_writing_is_mapped_read_only(tmp_path):
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"some")
        file.flush()
        assert map_file(file).readonly
