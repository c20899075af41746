import contextlib
import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import SetNotFoundError, StoreReadOnlyError
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore

NOW = "2026-01-01T00:00:00.000000Z"


def some_set(name="s", rank=2):
    return BonsaiLoraSet.new(LoraConfig(rank=rank), "base", name).add_mlp_adapters(8, 16)


def write(store, lora_set, previous=None):
    with store.lock(lora_set.adapter_name):
        return store.write(
            NextVersion(lora_set=lora_set, origin="initialized", now=NOW, previous=previous)
        )


@pytest.fixture
def opened(tmp_path):
    return SetStore(tmp_path)


def test_a_set_round_trips(opened, tmp_path):
    written = write(opened, some_set())
    for store in (opened, SetStore(tmp_path)):
        stored = store.read("s")
        assert stored.record == written.record == store.read_record("s")
        for name, adapter in some_set().registry.adapters.items():
            got = stored.lora_set.registry.get(name)
            assert np.array_equal(got.a_matrix, adapter.a_matrix)
            assert np.array_equal(got.b_matrix, adapter.b_matrix)
            assert got.scaling == adapter.scaling
            assert got.config == adapter.config


def test_arrays_are_read_only_views_of_the_file(opened):
    adapter = write(opened, some_set()).lora_set.registry.get("up_proj")
    assert not adapter.a_matrix.flags.owndata
    assert adapter.a_matrix.ctypes.data % 4 == 0
    with pytest.raises(ValueError, match="read-only"):
        adapter.a_matrix[0, 0] = 1


def test_another_store_on_the_folder_sees_changes_immediately(opened, tmp_path):
    other = SetStore(tmp_path)
    first = write(opened, some_set())
    assert other.read("s").record.version == 1
    second = write(other, some_set(rank=3), first.record)
    assert opened.read("s").record.version == second.record.version == 2
    assert opened.read("s").lora_set.registry.get("up_proj").rank == 3
    with other.lock("s"):
        other.delete("s")
    for store in (opened, other):
        with pytest.raises(SetNotFoundError):
            store.read("s")
        with pytest.raises(SetNotFoundError):
            store.read_record("s")


def test_a_record_is_read_once_for_each_version(opened):
    write(opened, some_set())
    first = opened.read_record("s")
    assert opened.read_record("s") is first
    write(opened, some_set(rank=4), first)
    assert opened.read_record("s").version == 2


def test_a_reader_keeps_its_version(opened):
    old = write(opened, some_set())
    before = bytes(old.file)
    write(opened, some_set(rank=5), old.record)
    with opened.lock("s"):
        opened.delete("s")
    assert bytes(old.file) == before
    assert old.lora_set.registry.get("up_proj").rank == 2


def test_names_never_leave_the_folder(opened):
    for name in ("../x", "", ".", "a/b", "x\0y", "tmp/../s"):
        with pytest.raises(SetNotFoundError):
            opened.read(name)
        with pytest.raises(SetNotFoundError):
            opened.delete(name)


def test_a_set_written_while_a_bad_file_is_moved_aside_is_kept(tmp_path):
    """A reader that found a bad file must not move what a writer has just put there."""
    for round_ in range(150):
        name = f"s{round_}"
        reader, writer = SetStore(tmp_path), SetStore(tmp_path)
        (tmp_path / "sets" / f"{name}.safetensors").write_bytes(b"garbage")

        def read(reader=reader, name=name):
            with contextlib.suppress(SetNotFoundError):
                reader.read(name)

        thread = threading.Thread(target=read)
        thread.start()
        write(writer, some_set(name))
        thread.join()
        assert writer.read(name).record.name == name
        assert (
            name not in writer.bad.reasons() or (tmp_path / "sets" / f"{name}.safetensors").exists()
        )


def test_odd_entries_do_not_stop_the_rest(opened, tmp_path):
    write(opened, some_set("good"))
    folder = tmp_path / "sets"
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    deep = b'{"__metadata__":' + b"[" * 10_000
    (folder / "deep.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    shutil.copy(folder / "good.safetensors", folder / "copy.safetensors")
    store = SetStore(tmp_path)
    assert [record.name for record in store.records()] == ["good"]
    assert set(store.bad.reasons()) == {"folder", "pipe", "loop", "deep", "copy"}
    assert store.read("good").record.name == "good"
    for name in ("folder", "pipe", "loop", "absent"):
        with pytest.raises(SetNotFoundError) as caught:
            store.read(name)
        assert caught.value.values == {"set": name}


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "noise"])
def test_a_bad_file_is_moved_aside_and_the_rest_is_served(opened, tmp_path, damage):
    write(opened, some_set("good"))
    write(opened, some_set("bad"))
    path = tmp_path / "sets" / "bad.safetensors"
    content = path.read_bytes()
    damaged = {
        "cut": content[:-1],
        "empty": b"",
        "foreign": b"\x02\0\0\0\0\0\0\0{}",
        "noise": os.urandom(3000),
    }[damage]
    path.write_bytes(damaged)
    store = SetStore(tmp_path)
    assert [record.name for record in store.records()] == ["good"]
    assert set(store.bad.reasons()) == {"bad"}
    assert set(SetStore(tmp_path).bad.reasons()) == {"bad"}
    assert [kept.read_bytes() for kept in (tmp_path / "bad").glob("*.safetensors")] == [damaged]
    assert store.list_names() == ["good"]
    write(store, some_set("bad"))
    assert store.read("bad").record.version == 1


def test_a_file_that_the_disk_cannot_read_is_not_found_and_stays(opened, tmp_path, monkeypatch):
    write(opened, some_set())

    def fail(*_args, **_options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = SetStore(tmp_path)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(SetNotFoundError) as caught:
        store.read("s")
    assert caught.value.values == {"set": "s"}
    assert "Input/output error" in store.bad_files()["s"]
    monkeypatch.undo()
    assert store.read("s").record.version == 1
    assert store.bad_files() == {}


def test_a_verification_waits_for_a_writer_to_move_a_damaged_file(opened, tmp_path):
    """A reader does not: it may hold the lock itself."""
    write(opened, some_set())
    path = tmp_path / "sets" / "s.safetensors"
    content = path.read_bytes()
    path.with_suffix(".x").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.with_suffix(".x").rename(path)
    with ThreadPoolExecutor(1) as threads:
        with SetStore(tmp_path).lock("s"):
            verified = threads.submit(opened.verify, "s")
            with pytest.raises(TimeoutError):
                verified.result(timeout=0.2)
            assert path.exists()
        with pytest.raises(SetNotFoundError):
            verified.result(timeout=10)
    assert not path.exists()
    assert "is damaged" in opened.bad.reasons()["s"]


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_bad_file_that_cannot_be_moved_stays_and_the_rest_is_served(
    opened, tmp_path, monkeypatch, error
):
    def refuse(*_args, **_options):
        raise OSError(error, os.strerror(error))

    for name in ("good", "bad"):
        write(opened, some_set(name))
    path = tmp_path / "sets" / "bad.safetensors"
    path.write_bytes(b"bad")
    store = SetStore(tmp_path)
    monkeypatch.setattr(Path, "rename", refuse)
    assert [record.name for record in store.records()] == ["good"]
    with pytest.raises(SetNotFoundError) as caught:
        store.read("bad")
    assert caught.value.values == {"set": "bad"}
    assert set(store.bad.reasons()) == {"bad"}
    assert path.read_bytes() == b"bad"
    assert store.read("good").record.name == "good"


def test_leftovers_are_removed_but_not_files_in_use(opened, tmp_path):
    (tmp_path / "tmp" / "left-by-the-dead").write_bytes(b"x")
    os.utime(tmp_path / "tmp" / "left-by-the-dead", (1, 1))
    with opened.new_file() as file:
        os.utime(file.name, (1, 1))
        SetStore(tmp_path)
        assert [path.name for path in (tmp_path / "tmp").iterdir()] == [os.path.basename(file.name)]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_writers_of_one_name_take_turns(tmp_path):
    write(SetStore(tmp_path), some_set())
    versions = []

    def change():
        store = SetStore(tmp_path)
        for _ in range(10):
            with store.lock("s"):
                present = store.read("s")
                written = store.write(
                    NextVersion(
                        lora_set=present.lora_set, origin="mixed", now=NOW, previous=present.record
                    )
                )
                versions.append(written.record.version)

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(2, 42))


def test_zeros_take_no_disk_space(opened, tmp_path):
    lora_set = BonsaiLoraSet.new(LoraConfig(rank=8), "base", "s").add_adapters({"m": (64, 500_000)})
    write(opened, lora_set)
    status = (tmp_path / "sets" / "s.safetensors").stat()
    assert status.st_size > 16_000_000
    assert status.st_blocks * 512 < 1_000_000
    assert not opened.read("s").lora_set.registry.get("m").b_matrix.any()


def test_a_read_only_store_is_an_error(opened, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(30, "Read-only file system")

    write(opened, some_set())
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreReadOnlyError):
        write(opened, some_set(rank=4), opened.read_record("s"))
    monkeypatch.undo()
    assert opened.read("s").record.version == 1


def test_the_number_of_open_sets_is_limited(tmp_path):
    store = SetStore(tmp_path, max_open=2)
    for name in "abcd":
        write(store, some_set(name))
    assert [opened.record.name for opened in store.open_sets()] == ["c", "d"]
    assert store.read("a").record.name == "a"
