"""What loading a model does to its file."""

import mmap
from dataclasses import replace

from buckets import create

from bonsai_lora.formats.mapped import map_file
from bonsai_lora.service.models import load
from bonsai_lora.storage.residency import resident_bytes
from bonsai_lora.storage.store import SetStore

PAGES = 2000


def test_every_page_is_read_and_every_product_is_ready(tmp_path):
    store = SetStore(tmp_path)
    create(store)
    stored = store.read("s")
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(PAGES * mmap.PAGESIZE + 1)  # a hole, which is not in memory until it is read
        stored = replace(stored, file=map_file(file))
    assert resident_bytes(stored.file) == 0
    assert not any(one.is_ready for one in stored.lora_set.registry.adapters.values())
    load(stored)
    assert resident_bytes(stored.file) == (PAGES + 1) * mmap.PAGESIZE
    assert all(one.is_ready for one in stored.lora_set.registry.adapters.values())
