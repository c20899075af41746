"""Stores over one bucket in memory, as different machines have them."""

import contextlib
import time

from obstore.store import MemoryStore

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import StoreUnreachableError
from bonsai_lora.service.retry import repeated
from bonsai_lora.storage.bucket import Bucket
from bonsai_lora.storage.bucket_store import BucketStore
from bonsai_lora.storage.cache import Cache
from bonsai_lora.storage.newset import NextVersion

NOW = "2026-01-01T00:00:00.000000Z"
URL = "s3://bucket/prefix"


class Line(Bucket):
    """A bucket whose network can be cut."""

    is_cut = False
    delay = 0.0
    """How long an attempt takes while it is cut, in seconds."""

    @contextlib.contextmanager
    def _asking(self, kind):
        if self.is_cut:
            time.sleep(self.delay)
            self._last_error = float("inf")
            raise StoreUnreachableError("the line is cut")
        self._last_error = 0.0
        with super()._asking(kind):
            yield


class Machines:
    """Makes machines with caches of their own below `folder`, over a bucket in memory or a given one."""

    def __init__(self, folder, bucket=None):
        self.folder = folder
        self.memory = bucket or MemoryStore()

    def store(self, name="one", *, cache_bytes=1 << 30, stale=60.0, if_error=3600.0):
        bucket = Line(self.memory)
        cache = Cache(self.folder / name, URL, cache_bytes)
        store = BucketStore(bucket, cache, stale_seconds=stale, stale_if_error_seconds=if_error)
        store.line = bucket
        return store


def made(name="s", *, rank=2, base="base", width=8):
    config = LoraConfig(rank=rank)
    return BonsaiLoraSet.new(config, base, name).add_adapters({"q_proj": (width, width)})


def create(store, name="s", check=lambda: None, **options):
    with store.lock(name):
        return store.write(
            NextVersion(
                lora_set=made(name, **options), origin="initialized", now=NOW, previous=None
            ),
            check,
        ).record


@repeated
def add(store, module, name="s"):
    """Add a module to a set, as a route does."""
    with store.lock(name):
        present = store.read(name)
        registry = present.lora_set.registry.add(module, LoraAdapter.new(3, 2, LoraConfig(rank=1)))
        return store.write(
            NextVersion(
                lora_set=present.lora_set.with_registry(registry),
                origin="mixed",
                now=NOW,
                previous=present.record,
            )
        ).record


@repeated
def delete(store, name="s"):
    with store.lock(name):
        store.read_record(name)
        store.delete(name)


def modules_of(store, name="s"):
    return set(store.read(name).lora_set.registry.adapters)
