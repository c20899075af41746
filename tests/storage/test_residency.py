"""How much of a mapped file is in memory."""

import mmap

from bonsai_lora.formats.mapped import map_file
from bonsai_lora.storage.residency import resident_bytes

PAGES = 64


def test_pages_that_nobody_read_or_wrote_are_not_in_memory(tmp_path):
    path = tmp_path / "file"
    with path.open("w+b") as file:
        file.truncate(PAGES * mmap.PAGESIZE)
        mapped = map_file(file)
        assert resident_bytes(mapped) == 0
        file.seek(mmap.PAGESIZE)
        file.write(bytes(2 * mmap.PAGESIZE))
        file.flush()
        assert resident_bytes(mapped) == 2 * mmap.PAGESIZE


def test_whole_pages_are_counted(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (mmap.PAGESIZE + 1))
    with path.open("rb") as file:
        assert resident_bytes(map_file(file)) == 2 * mmap.PAGESIZE
    assert resident_bytes(memoryview(b"")) == 0
