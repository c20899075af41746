"""What a worker had open when it died."""

import os

import pytest
from buckets import URL, Machines, create
from test_records import NOW, rewrite

from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import SetNotFoundError
from bonsai_lora.storage import bucket_store, in_use
from bonsai_lora.storage.bucket import Bucket
from bonsai_lora.storage.in_use import OpenNames, suspect_sets_of, suspects
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore


def test_names_are_kept_for_who_comes_after(tmp_path):
    names = OpenNames(tmp_path)
    for name in ("b", "a", "b"):
        names.add(name, ["a", "b"])
    assert suspects(tmp_path) == set()
    assert suspect_sets_of(tmp_path, os.getpid()) == ["a", "b"]
    assert suspects(tmp_path) == {"a", "b"}
    assert suspect_sets_of(tmp_path, os.getpid()) == []


def test_the_file_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(in_use, "_MOST_LINES", 8)
    names = OpenNames(tmp_path)
    for number in range(100):
        names.add(f"s{number}", ["kept"])
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 100
    assert {"kept", "s99"} <= set(suspect_sets_of(tmp_path, os.getpid()))


def test_a_suspect_is_verified_before_it_is_served(tmp_path):
    shared, root = tmp_path / "shared", tmp_path / "store"
    shared.mkdir()
    store = SetStore(root, shared=shared)
    for name in ("bad", "good"):
        made = BonsaiLoraSet.new(LoraConfig(rank=2), "base", name).add_mlp_adapters(8, 16)
        with store.lock(name):
            store.write(NextVersion(lora_set=made, origin="initialized", now=NOW, previous=None))
    path = root / "sets" / "bad.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert suspect_sets_of(shared, os.getpid()) == ["bad", "good"]
    after = SetStore(root, shared=shared)
    assert after.read("good").record.name == "good"
    with pytest.raises(SetNotFoundError):
        after.read("bad")
    assert "is damaged" in after.bad.reasons()["bad"]
    assert rewrite(after, "good").record.version == 2


def test_a_store_of_a_bucket_keeps_the_names_too(tmp_path, monkeypatch):
    shared, machines = tmp_path / "shared", Machines(tmp_path)
    shared.mkdir()
    create(machines.store(), "s")
    monkeypatch.setattr(bucket_store, "open_bucket", lambda _: Bucket(machines.memory))
    store = bucket_store.open_bucket_store(
        URL,
        tmp_path / "cache",
        cache_bytes=1 << 20,
        stale_seconds=60,
        stale_if_error_seconds=3600,
        shared=shared,
    )
    store.read("s")
    assert suspect_sets_of(shared, os.getpid()) == ["s"]
