"""Registrations of shared memory: what two workers that share a folder see of each other's."""

import os
import secrets

import pytest

from bonsai_lora.errors import InvalidRequestError, RegionNotFoundError
from bonsai_lora.storage.regions import SHARED_MEMORY, SharedRegions
from bonsai_lora.wire.oip import Placement


@pytest.fixture
def key():
    """The key of a file of 64 bytes in shared memory."""
    path = SHARED_MEMORY / f"bonsai-test-{os.getpid()}-{secrets.token_hex(4)}"
    path.write_bytes(bytes(range(64)))
    yield f"/{path.name}"
    path.unlink()


def test_what_one_worker_registers_the_other_serves(tmp_path, key):
    one, other = SharedRegions(tmp_path), SharedRegions(tmp_path)
    one.register("b", key, 8, 32)
    one.register("a", key, 0, 4)
    assert [(region.name, region.offset) for region in other.registered()] == [("a", 0), ("b", 8)]
    assert other.get("b") == one.get("b")
    assert bytes(other.read(Placement("b", 2, 3))) == bytes([10, 11, 12])
    other.write(Placement("b", 0, 2), memoryview(b"xy"))
    assert bytes(one.read(Placement("b", 0, 3))) == b"xy\x0a"
    other.unregister("b")
    for worker in (one, other):
        with pytest.raises(RegionNotFoundError):
            worker.read(Placement("b", 0, 1))


def test_a_name_is_registered_once_and_named_if_again(tmp_path, key):
    regions = SharedRegions(tmp_path)
    regions.register("r", key, 0, 8)
    with pytest.raises(InvalidRequestError) as caught:
        SharedRegions(tmp_path).register("r", key, 8, 8)
    assert caught.value.values == {"region": "r"}
    assert [(region.offset, region.byte_size) for region in regions.registered()] == [(0, 8)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_name_that_is_registered_again_is_the_new_region(tmp_path, key):
    one, other = SharedRegions(tmp_path), SharedRegions(tmp_path)
    one.register("r", key, 0, 8)
    assert bytes(one.read(Placement("r", 0, 1))) == b"\0"
    other.unregister("r")
    other.register("r", key, 16, 8)
    assert bytes(one.read(Placement("r", 0, 1))) == b"\x10"
