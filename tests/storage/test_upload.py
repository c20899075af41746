"""An upload that arrives in pieces, whatever their size."""

import hashlib

import numpy as np
import pytest

from bonsai_lora.errors import (
    HeaderTooLargeError,
    MalformedSafetensorsError,
    UnsupportedAdapterError,
)
from bonsai_lora.formats import safetensors
from bonsai_lora.storage.upload import Upload

TENSORS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}
FILES = {
    "short header": safetensors.encode(TENSORS),
    "long header": safetensors.encode(TENSORS, {"note": "x" * 100_000}),
}


def receive(file, content, size, limit=1 << 20):
    upload = Upload(file, limit)
    for start in range(0, len(content), size):
        upload.write(content[start : start + size])
    return upload.finish()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 1 << 20])
def test_the_data_come_after_room_for_the_header_of_the_set(tmp_path, name, size):
    content = FILES[name]
    head = 8 + int.from_bytes(content[:8], "little")
    with (tmp_path / "file").open("w+b") as file:
        received = receive(file, content, size)
        start = received.header.data_start
        # The set's header has the same tensors under other names, and a record.
        assert 2 * head < start <= 2 * head + (1 << 16)
        assert start % 4096 == 0
        assert received.digest == hashlib.sha256(content[head:]).hexdigest()
        received.write_header(b"h" * start)
        assert (tmp_path / "file").read_bytes() == b"h" * start + content[head:]
        assert received.tensors.keys() == TENSORS.keys()
        for key, array in TENSORS.items():
            assert np.array_equal(received.tensors[key], array)


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1])
def test_an_upload_that_ends_early_is_refused(tmp_path, cut):
    with (tmp_path / "file").open("w+b") as file, pytest.raises(MalformedSafetensorsError):
        receive(file, FILES["short header"][:cut], 5)


def test_a_header_over_the_limit_is_refused_before_it_is_received(tmp_path):
    content = FILES["long header"]
    with (tmp_path / "file").open("w+b") as file:
        upload = Upload(file, 100_000)
        with pytest.raises(HeaderTooLargeError):
            upload.write(content[:4096])
        assert (tmp_path / "file").stat().st_size == 0


@pytest.mark.parametrize("size", [1, 5, 8, 9, 1 << 20])
@pytest.mark.parametrize("length", [640, 1408])
def test_a_header_length_that_looks_like_a_pickle(tmp_path, length, size):
    """Its first bytes, 0x80 and 0x02, are those of a pickle, unless the next piece is awaited."""
    short = FILES["short header"]
    start = 8 + int.from_bytes(short[:8], "little")
    content = length.to_bytes(8, "little") + short[8:start].ljust(length) + short[start:]
    with (tmp_path / "file").open("w+b") as file:
        assert receive(file, content, size).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("size", [1, 3, 9, 1 << 20])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUF\3\0\0\0" + bytes(5000), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (bytes(257) + b"ustar" + bytes(8000), "tar"),
    ],
)
def test_another_format_is_named_whatever_the_pieces(tmp_path, content, says, size):
    with (
        (tmp_path / "file").open("w+b") as file,
        pytest.raises(UnsupportedAdapterError, match=says),
    ):
        receive(file, content, size)
