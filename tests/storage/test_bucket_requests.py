"""Requests to a bucket: S3 over HTTP, and what a bucket may do wrong."""

import os

import obstore
import pytest
from buckets import Machines, create, delete
from obstore.store import MemoryStore
from s3 import serving_s3
from test_bucket_gc import NOTHING, gc, keys_in

from bonsai_lora.errors import StoreUnreachableError
from bonsai_lora.settings import SettingsError, read_settings
from bonsai_lora.storage.bucket import (
    PIECE_BYTES,
    Bucket,
    ConflictError,
    SameError,
    open_bucket,
)


@pytest.fixture
def server(request, monkeypatch):
    """A server, with the faults of the test's parameter."""
    with serving_s3(**getattr(request, "param", {})) as server:
        for name, value in server.variables().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(server):
    return open_bucket("s3://sets/p")


def test_small_objects_are_compared_and_swapped(bucket, server):
    first = bucket.put("k", b"one", replaces=None)
    assert server.objects == {"p/k": b"one"}
    assert bucket.get("k").body == b"one"
    with pytest.raises(SameError):
        bucket.get("k", unless=first)
    for wrong in (None, '"0"'):
        with pytest.raises(ConflictError):
            bucket.put("k", b"other", replaces=wrong)
    second = bucket.put("k", b"two", replaces=first)
    assert bucket.get("k", unless=first).etag == second
    bucket.delete("k")
    bucket.delete("k")
    assert bucket.get("k") is None
    assert bucket.requests == {"put": 4, "get": 6, "delete": 2}, "a conflict is looked at"
    assert bucket.is_reachable


def test_a_listing_goes_on_after_a_name(bucket):
    for key in ("sets/a", "sets/b", "sets/c", "other/d"):
        bucket.put(key, key.encode(), replaces=None)
    found = [one for chunk in bucket.list("sets", after="a") for one in chunk]
    assert [(one.key, one.size) for one in found] == [("sets/b", 6), ("sets/c", 6)]
    assert [one.etag for one in found] == [bucket.get(one.key).etag for one in found]
    assert list(bucket.list("nothing")) == []


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({}, True),
        ({"ignores_conditions": True}, False),
        ({"deletes": "never"}, False),
        ({"deletes": "in words"}, False),
    ],
    indirect=["server"],
)
def test_a_conditional_delete_is_used_if_it_is_one(bucket, expected):
    assert bucket.has_delete_if() == expected


def test_a_bucket_in_memory_has_no_conditional_delete():
    assert not Bucket(MemoryStore()).has_delete_if()


def test_gc_removes_tombstones_where_it_can_delete_with_a_condition(bucket, tmp_path):
    machines = Machines(tmp_path, bucket._small)
    store = machines.store()
    for name in ("gone", "kept"):
        create(store, name)
    delete(store, "gone")
    assert keys_in(machines, "sets") == ["sets/gone", "sets/kept"]
    found = gc(store, NOTHING)
    assert (found.tombstones, found.kept_tombstones) == (1, 0)
    assert keys_in(machines, "sets") == ["sets/kept"]
    assert create(store, "gone").version == 1, "nothing is left of its versions"


@pytest.mark.parametrize("size", [0, 5, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES + 7])
def test_a_large_object_is_written_and_read_in_pieces(tmp_path, size):
    bucket = Bucket(MemoryStore())
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    bucket.write("k", tmp_path / "file")
    pieces = list(bucket.pieces("k", size))
    assert b"".join(pieces) == content
    assert all(len(one) <= PIECE_BYTES for one in pieces)
    assert not any(bucket.pieces("k", size + 1)), "it is a different object"
    with pytest.raises(FileNotFoundError):
        list(bucket.pieces("absent", size))
    assert bucket.is_reachable


def test_few_pieces_are_read_ahead_of_who_takes_them(tmp_path, monkeypatch):
    """Each is in memory, and a slow disk must not make a large object collect there."""
    bucket, asked = Bucket(MemoryStore()), []
    (tmp_path / "file").write_bytes(bytes(12 * PIECE_BYTES))
    bucket.write("k", tmp_path / "file")
    get_range = obstore.get_range
    monkeypatch.setattr(
        obstore, "get_range", lambda *path, **span: (asked.append(1), get_range(*path, **span))[1]
    )
    for taken, _ in enumerate(bucket.pieces("k", 12 * PIECE_BYTES), 1):
        assert len(asked) <= taken + 3
    assert len(asked) == 12


def test_a_small_object_that_is_too_large_is_not_read(bucket, server):
    server.objects["p/k"] = bytes(5 << 20)
    assert bucket.get("k").body == b""


@pytest.mark.parametrize(
    "server", [{"status": 403}, {"status": 404}, {"status": 500}], indirect=True
)
def test_whatever_keeps_a_bucket_from_answering_is_one_error(bucket, server, tmp_path):
    """The next requests of a second are refused at once."""
    (tmp_path / "file").write_bytes(b"content")
    asks = [
        lambda: bucket.put("k", b"one", replaces=None),
        lambda: bucket.write("k", tmp_path / "file"),
        lambda: list(bucket.list("sets")),
        bucket.now,
    ]
    for ask in asks:
        bucket._down_until = 0.0
        with pytest.raises(StoreUnreachableError):
            ask()
        assert not bucket.is_reachable
    asked = len(server.asked)
    for ask in asks:
        with pytest.raises(StoreUnreachableError):
            ask()
    assert len(server.asked) == asked


@pytest.mark.parametrize("url", ["s3:/", "ftp://bucket/p", "nonsense"])
def test_what_is_not_a_url_of_a_bucket_is_refused(url):
    with pytest.raises(ValueError, match="expected such as s3://bucket/prefix"):
        open_bucket(url)


@pytest.mark.parametrize(
    "url", ["s3://key:secret@sets/p", "s3://key:a/secret@sets", "s5://k:secret@sets"]
)
def test_a_password_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match=r"the store 's\d:...@sets") as refused:
        open_bucket(url)
    assert "secret" not in str(refused.value)
    with pytest.raises(SettingsError) as refused:
        read_settings(store=f"x{url}")
    assert "'xs" in str(refused.value)
    assert "secret" not in str(refused.value)
