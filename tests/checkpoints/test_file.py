"""Files of a base that other programs change while they are read."""

import errno
import os

import numpy as np
import pytest

from bonsai_lora.checkpoints.file import BaseFile, StoredTensor
from bonsai_lora.errors import BaseChangedError, BusyError

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def opened(path):
    return BaseFile("b", path.name, path)


def test_any_range(opened):
    assert bytes(opened.read(0, len(CONTENT))) == CONTENT
    assert bytes(opened.read(255, 258)) == CONTENT[255:258]
    assert bytes(opened.read(7, 7)) == b""


def test_reads_that_give_less_than_asked_for_go_on(opened, monkeypatch):
    """As reads of over 2 GiB do, and some network file systems."""
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:100]], at)
    )
    assert bytes(opened.read(3, 1000)) == CONTENT[3:1000]


def test_a_block_of_a_matrix(opened):
    expected = np.frombuffer(CONTENT[4:], "<f4")[: 60 * 21].reshape(60, 21)
    tensor = StoredTensor(opened, 4, np.dtype("<f4"), (3, 20, 21)).as_matrix(60)
    block = (slice(31, 33), slice(0, 21))
    assert tensor[block].tobytes() == expected[block].tobytes()
    block = (slice(40, 41), slice(5, 9))
    assert tensor[block].tobytes() == expected[block].tobytes()


def test_a_truncated_file(opened, path):
    os.truncate(path, 1000)
    for start, stop in ((0, 10), (900, 1100), (5000, 6000)):
        with pytest.raises(BaseChangedError):
            opened.read(start, stop)


def test_an_overwritten_file_of_the_same_size(opened, path):
    status = path.stat()
    path.write_bytes(CONTENT[::-1])
    # As rsync --times does: only the time of the change itself tells.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BaseChangedError, match=r"model\.safetensors of base 'b' was overwritten"):
        opened.read(0, 10)


@pytest.mark.parametrize("way", ["replaced", "removed"])
def test_a_file_that_was_replaced_or_removed_is_kept(opened, path, way):
    if way == "replaced":
        other = path.with_suffix(".new")
        other.write_bytes(CONTENT[::-1])
        other.rename(path)
    else:
        path.unlink()
    assert bytes(opened.read(0, len(CONTENT))) == CONTENT


def test_no_descriptor_is_left(path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(path, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(BusyError):
            BaseFile("b", path.name, path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_descriptor_is_closed_with_the_object(path):
    before = len(os.listdir("/proc/self/fd"))
    opened = BaseFile("b", path.name, path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del opened
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_removed_while_the_folder_is_read(tmp_path):
    with pytest.raises(BaseChangedError, match=r"x of base 'b' was removed while it was opened"):
        BaseFile("b", "x", tmp_path / "x")


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ESTALE, BaseChangedError), (errno.EIO, OSError)]
)
def test_a_file_that_a_file_server_removed(opened, monkeypatch, number, error):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(error, match=r"was removed while it was read|Input/output error"):
        opened.read(0, 10)


def test_a_file_that_could_change_unnoticed_is_not_opened_yet(path, monkeypatch):
    """File systems with whole seconds in their times: two changes within one look like one."""
    monkeypatch.setattr("bonsai_lora.checkpoints.file.is_unsettled", lambda _: True)
    with pytest.raises(BaseChangedError, match="less than two seconds ago"):
        BaseFile("b", path.name, path)


def test_reads_end_with_the_file(opened):
    assert bytes(opened.read_at(len(CONTENT) - 3, 10)) == CONTENT[-3:]
    assert bytes(opened.read_at(5, 3)) == CONTENT[5:8]
